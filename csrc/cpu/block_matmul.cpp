// The block-sparse product and its two gradients: packed panels under a register tile.
//
// x @ (w * mask)^T and grad @ (w * mask) are one routine: rows times a matrix whose blocks come from
// w, read with the strides of w or of its transpose. A live block is packed, scaled by its mask, once
// for many rows; a block that is off is never touched. Sums stay in registers over all live blocks of
// a group. The weight's gradient goes block by block through a buffer of one block, so that dmask
// needs no dense dw.

#include <algorithm>
#include <vector>

#include "cpu/microkernel.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace rtk::RTK_ISA {
namespace {

constexpr int64_t kDepth = 192;      // steps in a packed group: kColumns * kDepth floats fit in L1
constexpr int64_t kRowChunk = 2048 / kRows * kRows;  // rows packed at a time: bounds the copy of the dense operand

// The dense operand (rows, depth), row-major, as panels of kRows rows; missing rows are zero.
void pack_rows(const float* from, int64_t rows, int64_t depth, float* to, int threads) {
  const int64_t grain = 1 + 32768 / (depth * kRows + 1);
  parallel_for(ceil_div(rows, kRows), grain, threads, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kRows;
      float* panel_to = to + first * depth;
      for (int i = 0; i < kRows; ++i) {
        const float* row = from + (first + i) * depth;
        if (first + i < rows) {
          for (int64_t d = 0; d < depth; ++d) panel_to[d * kRows + i] = row[d];
        } else {
          for (int64_t d = 0; d < depth; ++d) panel_to[d * kRows + i] = 0;
        }
      }
    }
  });
}

// w seen as (depth, columns) of blocks (block_depth, block_columns), for one of the two products.
struct BlockView {
  const float *w, *mask;
  int64_t depth, columns, block_depth, block_columns;
  int64_t depth_stride, column_stride, mask_depth_stride, mask_column_stride;

  float scale(int64_t depth_block, int64_t column_block) const {
    return mask[depth_block * mask_depth_stride + column_block * mask_column_stride];
  }
};

// Live runs of a column of blocks that are packed and multiplied together.
struct Group {
  std::vector<Run> runs;
  std::vector<float> scales;
  int64_t depth = 0;
};

std::vector<Group> live_groups(const BlockView& v, int64_t column_block) {
  std::vector<Group> groups;
  for (int64_t block = 0; block < v.depth / v.block_depth; ++block) {
    const float scale = v.scale(block, column_block);
    if (scale == 0) continue;
    for (int64_t done = 0; done < v.block_depth;) {
      const int64_t depth = std::min(kDepth, v.block_depth - done);
      if (groups.empty() || groups.back().depth + depth > kDepth) groups.emplace_back();
      Group& group = groups.back();
      group.runs.push_back({block * v.block_depth + done, depth});
      group.scales.push_back(scale);
      group.depth += depth;
      done += depth;
    }
  }
  return groups;
}

// A group's weights times mask for `width` columns from `column` on, as one panel of kColumns.
void pack_columns(const BlockView& v, const Group& group, int64_t column, int64_t width, float* to) {
  for (size_t r = 0; r < group.runs.size(); ++r) {
    const auto [begin, depth] = group.runs[r];
    const float* from = v.w + begin * v.depth_stride + column * v.column_stride;
    const float scale = group.scales[r];
    if (v.column_stride == 1) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t j = 0; j < width; ++j) to[d * kColumns + j] = from[d * v.depth_stride + j] * scale;
      }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t d = 0; d < depth; ++d) to[d * kColumns + j] = from[j * v.column_stride + d] * scale;
      }
    }
    if (width < kColumns) {
      for (int64_t d = 0; d < depth; ++d) std::fill_n(to + d * kColumns + width, kColumns - width, 0.0f);
    }
    to += depth * kColumns;
  }
}

// out[row_begin:row_end, the columns of one block] = packed rows @ that column of blocks.
void multiply_column_block(const BlockView& v, const float* packed, int64_t row_begin, int64_t row_end,
                           int64_t column_block, float* panel, float* out) {
  const int64_t first_column = column_block * v.block_columns;
  const std::vector<Group> groups = live_groups(v, column_block);
  if (groups.empty()) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      std::fill_n(out + row * v.columns + first_column, v.block_columns, 0.0f);
    }
  }
  float edge[kRows * kColumns];
  for (size_t g = 0; g < groups.size(); ++g) {
    const Group& group = groups[g];
    const int64_t run_count = static_cast<int64_t>(group.runs.size());
    for (int64_t j = 0; j < v.block_columns; j += kColumns) {
      const int64_t width = std::min<int64_t>(kColumns, v.block_columns - j);
      pack_columns(v, group, first_column + j, width, panel);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        const float* rows = packed + row * v.depth;
        float* to = out + row * v.columns + first_column + j;
        const int64_t height = std::min<int64_t>(kRows, row_end - row);
        if (width == kColumns && height == kRows) {
          multiply_panels(group.runs.data(), run_count, rows, panel, g > 0, to, v.columns);
          continue;
        }
        multiply_panels(group.runs.data(), run_count, rows, panel, false, edge, kColumns);
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t c = 0; c < width; ++c) {
            float& sum = to[i * v.columns + c];
            sum = (g > 0 ? sum : 0.0f) + edge[i * kColumns + c];
          }
        }
      }
    }
  }
}

// out (m, columns) = x (m, depth) @ view
void multiply(const BlockView& v, int64_t m, const float* x, float* out, int threads) {
  const int64_t chunk = std::min(kRowChunk, ceil_div(m, kRows) * kRows);
  const int64_t column_blocks = v.columns / v.block_columns;
  if (m == 0 || column_blocks == 0) return;
  const Buffer packed(chunk * v.depth);
  for (int64_t first = 0; first < m; first += chunk, x += chunk * v.depth, out += chunk * v.columns) {
    const int64_t rows = std::min(chunk, m - first), panels = ceil_div(rows, kRows);
    pack_rows(x, rows, v.depth, packed.get(), threads);
    // With few columns of blocks, the rows are split too: some tasks per thread, as densities differ.
    const int64_t parts = std::min(panels, ceil_div(threads > 1 ? 4 * threads : 1, column_blocks));
    const int64_t part_rows = ceil_div(panels, parts) * kRows;
    parallel_for(column_blocks * parts, 1, threads, [&](int64_t begin, int64_t end) {
      const Buffer panel(kDepth * kColumns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % parts * part_rows;
        multiply_column_block(v, packed.get(), row, std::min(rows, row + part_rows), task / parts, panel.get(), out);
      }
    });
  }
}

// Columns of a row-major (rows, columns) matrix as panels of `width` per block, each (rows, width) and
// filled up with zeros: the reduced dimension of the weight's gradient is the rows.
void pack_blocks(const float* from, int64_t rows, int64_t columns, int64_t block, int width, float* to, int threads) {
  const int64_t block_panels = ceil_div(block, width);
  parallel_for(columns / block * block_panels, ceil_div(32768, rows * width), threads, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t in_block = panel % block_panels * width;
      const int64_t count = std::min<int64_t>(width, block - in_block);
      const float* source = from + panel / block_panels * block + in_block;
      float* target = to + panel * rows * width;
      for (int64_t r = 0; r < rows; ++r, source += columns, target += width) {
        std::copy_n(source, count, target);
        std::fill_n(target + count, width - count, 0.0f);
      }
    }
  });
}

// One block's part of the gradients, from sums = its grad^T @ x over the rows of a chunk.
struct BlockGradient {
  const BlockMatmul& p;
  const float* sums;
  int64_t stride, offset;  // a row of sums; where the block starts in w and dw

  // dw = (first chunk) or += scale * sums; exactly 0 where the block is off.
  void to_dw(float scale, bool first, float* dw) const {
    for (int64_t i = 0; i < p.bn; ++i) {
      const float* from = sums + i * stride;
      float* to = dw + offset + i * p.k;
      if (scale == 0) {
        std::fill_n(to, p.bk, 0.0f);
      } else if (first) {
        for (int64_t j = 0; j < p.bk; ++j) to[j] = scale * from[j];
      } else {
        for (int64_t j = 0; j < p.bk; ++j) to[j] += scale * from[j];
      }
    }
  }

  // sum(w * sums), in lanes that vectorise without reordering.
  double dot_w() const {
    float lanes[kColumns] = {};
    for (int64_t i = 0; i < p.bn; ++i) {
      const float *a = sums + i * stride, *b = p.w + offset + i * p.k;
      int64_t j = 0;
      for (; j + kColumns <= p.bk; j += kColumns) {
        for (int lane = 0; lane < kColumns; ++lane) lanes[lane] += a[j + lane] * b[j + lane];
      }
      for (int lane = 0; j < p.bk; ++j, ++lane) lanes[lane] += a[j] * b[j];
    }
    double dot = 0;
    for (const float lane : lanes) dot += lane;
    return dot;
  }
};

}  // namespace

void block_matmul(const BlockMatmul& p, const float* x, float* out, int threads) {
  multiply({p.w, p.mask, p.k, p.n, p.bk, p.bn, 1, p.k, 1, p.k / p.bk}, p.m, x, out, threads);
}

void block_matmul_bwd_input(const BlockMatmul& p, const float* grad, float* out, int threads) {
  multiply({p.w, p.mask, p.n, p.k, p.bn, p.bk, p.k, 1, p.k / p.bk, 1}, p.m, grad, out, threads);
}

void block_matmul_bwd_weight(const BlockMatmul& p, const float* grad, const float* x, float* dw, float* dmask,
                             int threads) {
  constexpr int64_t kChunk = 1024, kStep = 256;
  const int64_t n_blocks = p.n / p.bn, k_blocks = p.k / p.bk;
  const int64_t n_panels = ceil_div(p.bn, kRows), k_panels = ceil_div(p.bk, kColumns);
  const int64_t chunk = std::min(kChunk, p.m), stride = k_panels * kColumns;
  if (dmask) std::fill_n(dmask, n_blocks * k_blocks, 0.0f);
  if (p.m == 0 && dw) std::fill_n(dw, p.n * p.k, 0.0f);

  const Buffer packed_grad(chunk * n_blocks * n_panels * kRows), packed_x(chunk * k_blocks * stride);
  for (int64_t first = 0; first < p.m; first += chunk) {
    const int64_t rows = std::min(chunk, p.m - first);
    pack_blocks(grad + first * p.n, rows, p.n, p.bn, kRows, packed_grad.get(), threads);
    pack_blocks(x + first * p.k, rows, p.k, p.bk, kColumns, packed_x.get(), threads);
    // Neighbouring tasks share a row of blocks: its panels of grad stay in the cache.
    parallel_for(n_blocks * k_blocks, 4, threads, [&](int64_t begin, int64_t end) {
      const Buffer sums(n_panels * kRows * stride);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n_block = block / k_blocks, k_block = block % k_blocks;
        const BlockGradient gradient{p, sums.get(), stride, n_block * p.bn * p.k + k_block * p.bk};
        const float scale = p.mask[block];
        if (scale != 0 || dmask) {
          for (int64_t step = 0; step < rows; step += kStep) {
            const Run run{0, std::min(kStep, rows - step)};
            for (int64_t j = 0; j < k_panels; ++j) {
              const float* columns = packed_x.get() + ((k_block * k_panels + j) * rows + step) * kColumns;
              for (int64_t i = 0; i < n_panels; ++i) {
                const float* grads = packed_grad.get() + ((n_block * n_panels + i) * rows + step) * kRows;
                float* tile = sums.get() + i * kRows * stride + j * kColumns;
                multiply_panels(&run, 1, grads, columns, step > 0, tile, stride);
              }
            }
          }
        }
        if (dw) gradient.to_dw(scale, first == 0, dw);
        if (dmask) dmask[block] += static_cast<float>(gradient.dot_w());
      }
    });
  }
}

}  // namespace rtk::RTK_ISA
