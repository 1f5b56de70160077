// Exact top-k masks of many tensors in one cooperative launch, by radix selection on integers that order as
// the scores do.
//
// The scores are read once if the thresholds can be guessed. Each segment (what shares one k: a tensor, or
// the whole list) has a bracket of keys around its last threshold, or, in a first call, around that of a
// sixteenth of its scores. The first pass writes the masks of all scores outside of their bracket, counts
// those above it and lists those inside, the candidates. If the k-th is among them, which the counts tell,
// one block a segment selects exactly among the candidates, and the rest is written already. Segments whose
// bracket missed find one of 1,024 keys by two counting passes, and have a second such pass. Where even that
// holds too many (masses of equal scores, or a NaN as the k-th), a third count finds the threshold and its
// ties are cut in index order.
//
// Every block works on a run of consecutive tiles. Candidates carry their index, so their order is nobody's
// concern, and all else that atomics do is count: threads and their timing decide nothing.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/topk_mask_selection.h"
#include "rtk.h"

namespace rtk {
namespace {

using namespace topk;

// What most calls of a plan do not need is kept out of the kernel, so that it costs no registers there.
template <class F, int Capacity>
__device__ __noinline__ void sample(const Table<Capacity>& table, Shared& shared) {
  Selection<F, Capacity>{table, shared}.sample(cooperative_groups::this_grid());
}
template <class F, int Capacity>
__device__ __noinline__ void narrow(const Table<Capacity>& table, Shared& shared) {
  Selection<F, Capacity>{table, shared}.narrow(cooperative_groups::this_grid());
}
template <class F, int Capacity>
__device__ __noinline__ void cut_ties(const Table<Capacity>& table, Shared& shared) {
  Selection<F, Capacity>{table, shared}.cut_ties(cooperative_groups::this_grid());
}

template <class F, int Capacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    topk_mask(const __grid_constant__ Table<Capacity> table) {
  __shared__ Shared shared;
  const Grid grid = cooperative_groups::this_grid();
  Selection<F, Capacity> selection{table, shared};
  selection.begin();
  const auto missed = [&](uint32_t s) { return selection.missed(s); };

  if (shared.calls == 0) sample<F>(table, shared);
  bool second = false;
  for (;; second = true) {
    if (second) narrow<F>(table, shared);
    selection.partition(second ? Selection<F, Capacity>::kSecond : selection.first(),
                        [&](uint32_t s) { return !second || selection.missed(s); });
    grid.sync();
    if (second || !selection.any(missed)) break;
  }
  for (uint32_t s = blockIdx.x; s < table.segments; s += gridDim.x) {
    if (selection.trivial(s)) continue;
    const uint32_t counts = selection.missed(s) ? Selection<F, Capacity>::kSecond : selection.first();
    if (selection.holds(s, counts)) selection.select(s, counts);
  }
  if (second && selection.any([&](uint32_t s) { return selection.tied(s); })) cut_ties<F>(table, shared);
  if (table.fresh || blockIdx.x > 0) return;
  // For the next call. Every block has read the number before the first barrier.
  if (threadIdx.x == 0) table.header->calls = shared.calls + 1;
  for (uint32_t s = threadIdx.x; s < table.segments; s += kThreads) {
    Record& record = table.records[s];
    const uint32_t next = 1 - selection.first();
    record.above[next] = record.candidates[next] = record.overflown[next] = 0;
  }
}

// Where the parts of a workspace begin, in bytes.
struct Layout {
  int64_t records, bins, ties, candidates, bytes;
  int64_t tiles, total;
};

int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

Layout layout_of(const std::vector<int64_t>& sizes, bool whole) {
  Layout at{};
  int64_t candidates = 0;
  for (const int64_t size : sizes) {
    at.tiles += tiles_of(size);
    at.total += size;
    candidates += capacity_of(size);
  }
  if (whole) candidates = capacity_of(at.total);
  const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t segments = whole ? 1 : static_cast<int64_t>(sizes.size());
  at.records = align(sizeof(Header));
  at.bins = at.records + align(segments * sizeof(Record));
  at.ties = at.bins + segments * kBins * sizeof(uint32_t);
  at.candidates = at.ties + align(at.tiles * sizeof(uint32_t));
  at.bytes = at.candidates + candidates * sizeof(uint64_t);
  return at;
}

template <class F, int Capacity>
void run(const TopkMasks& p, const Layout& at, int device, cudaStream_t stream) {
  char* memory = static_cast<char*>(p.workspace);
  Table<Capacity> table{};
  table.header = reinterpret_cast<Header*>(memory);
  table.records = reinterpret_cast<Record*>(memory + at.records);
  table.bins = reinterpret_cast<uint32_t*>(memory + at.bins);
  table.ties = reinterpret_cast<uint32_t*>(memory + at.ties);
  table.candidates = reinterpret_cast<uint64_t*>(memory + at.candidates);
  table.device_k = p.device_k;
  table.pieces = static_cast<uint32_t>(p.sizes.size());
  table.segments = p.whole ? 1 : table.pieces;
  table.tiles = static_cast<uint32_t>(at.tiles);
  table.total = static_cast<uint32_t>(at.total);
  table.whole = p.whole;
  table.fresh = p.fresh;
  int64_t tile = 0, candidate = 0;
  for (size_t i = 0; i < p.sizes.size(); ++i) {
    Piece& piece = table.piece[i];
    piece.scores = p.scores[i];
    piece.mask = p.masks.empty() ? nullptr : p.masks[i];
    piece.bits = p.bits.empty() ? nullptr : p.bits[i];
    piece.size = static_cast<uint32_t>(p.sizes[i]);
    piece.first_tile = static_cast<uint32_t>(tile);
    piece.k = i < p.k.size() ? static_cast<uint32_t>(p.k[i]) : 0;
    piece.first_candidate = p.whole ? 0 : static_cast<uint32_t>(candidate);
    tile += tiles_of(p.sizes[i]);
    candidate += capacity_of(p.sizes[i]);
  }

  int multiprocessors = 0, blocks = 0;
  check("topk_mask", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check("topk_mask",
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, topk_mask<F, Capacity>, kThreads, 0));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  const int64_t most = static_cast<int64_t>(std::min(blocks, kBlocksPerSm)) * multiprocessors;
  launch_with("topk_mask", &attribute, topk_mask<F, Capacity>, std::min(most, at.tiles), kThreads, 0, stream,
              table);
}

template <class F>
void run(const TopkMasks& p, const Layout& at, int device, cudaStream_t stream) {
  // A short argument is launched sooner. Scores in fp16 are rare, and a kernel takes seconds to compile.
  if constexpr (!std::is_same_v<F, F16>) {
    if (p.sizes.size() <= kFew) return run<F, kFew>(p, at, device, stream);
  }
  run<F, kMany>(p, at, device, stream);
}

}  // namespace

int64_t topk_mask_workspace(const std::vector<int64_t>& sizes, bool whole) { return layout_of(sizes, whole).bytes; }

void topk_mask_cuda(const TopkMasks& p, int device, void* stream) {
  const Layout at = layout_of(p.sizes, p.whole);
  if (p.sizes.size() > kMany || at.tiles * int64_t(kTile) >= int64_t(1) << 32 || at.total > int64_t(1) << 31) {
    throw std::invalid_argument("topk_mask: too many tensors or scores for one launch");
  }
  if (at.tiles == 0) return;
  const DeviceGuard guard("topk_mask", device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return run<F32>(p, at, device, queue);
    case DType::bf16: return run<Bf16>(p, at, device, queue);
    case DType::f16: return run<F16>(p, at, device, queue);
    default: throw std::invalid_argument("topk_mask: scores must be f32, bf16 or f16");
  }
}

}  // namespace rtk
