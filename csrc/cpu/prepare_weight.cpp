// The weight that a convolution runs on: masked, cast and in the layout asked for, in one pass.
//
// Dimensions are sorted by the output's strides and merged where all three tensors allow it, so one
// path serves every layout and broadcast; tensors that are dense in one order become a single row.

#include <algorithm>

#include "cpu/numeric.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace rtk::RTK_ISA {
namespace {

constexpr int64_t kTile = 1024;

struct Dim {
  int64_t size, w, mask, out;
};

// 4 dimensions, the last with the smallest output stride, leading ones of size 1 where some merged.
struct Layout {
  Dim dims[4];
};

Layout merged(const PrepareWeight& p) {
  std::vector<Dim> dims;
  for (int d = 0; d < 4; ++d) {
    if (p.sizes[d] != 1) dims.push_back({p.sizes[d], p.w_strides[d], p.mask_strides[d], p.out_strides[d]});
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.out > b.out; });
  Layout layout;
  std::fill_n(layout.dims, 4, Dim{1, 1, 1, 1});
  int at = 4;
  for (size_t i = dims.size(); i-- > 0;) {
    const Dim& outer = dims[i];
    Dim& inner = layout.dims[std::min(at, 3)];
    if (at < 4 && outer.w == inner.w * inner.size && outer.mask == inner.mask * inner.size &&
        outer.out == inner.out * inner.size) {
      inner.size *= outer.size;
    } else {
      layout.dims[--at] = outer;
    }
  }
  return layout;
}

// The elements that are loaded, multiplied and stored together, a part of the last two dimensions.
struct Tile {
  int64_t rows, columns;
};

template <class Value, class T>
Value convert(T v) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return static_cast<Value>(v);
  } else {
    return to_float(v);
  }
}

// Calls copy(r, c) all over the tile, the longer side inside: starting a loop costs more than the 3 steps
// of a filter's row.
template <class Copy>
void visit(Tile tile, Copy copy) {
  if (tile.columns >= tile.rows) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t c = 0; c < tile.columns; ++c) copy(r, c);
    }
  } else {
    for (int64_t c = 0; c < tile.columns; ++c) {
      for (int64_t r = 0; r < tile.rows; ++r) copy(r, c);
    }
  }
}

// The tile of a tensor as a dense run of Values. Stride 1 apart, so that it vectorises.
template <class Value, class T>
void load(const void* base, int64_t offset, int64_t row_stride, int64_t stride, Tile tile, Value* to) {
  const T* from = static_cast<const T*>(base) + offset;
  const int64_t columns = tile.columns;
  if (stride == 1) {
    visit(tile, [=](int64_t r, int64_t c) { to[r * columns + c] = convert<Value>(from[r * row_stride + c]); });
  } else {
    visit(tile, [=](int64_t r, int64_t c) { to[r * columns + c] = convert<Value>(from[r * row_stride + c * stride]); });
  }
}

template <class T, class Value>
T round_to(Value v) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return static_cast<T>(v);
  } else {
    return from_float<T>(static_cast<float>(v));
  }
}

template <class Value, class T>
void store(const Value* from, void* base, int64_t offset, int64_t row_stride, int64_t stride, Tile tile) {
  T* to = static_cast<T*>(base) + offset;
  const int64_t columns = tile.columns;
  if (stride == 1) {
    visit(tile, [=](int64_t r, int64_t c) { to[r * row_stride + c] = round_to<T>(from[r * columns + c]); });
  } else {
    visit(tile, [=](int64_t r, int64_t c) { to[r * row_stride + c * stride] = round_to<T>(from[r * columns + c]); });
  }
}

template <class Value>
using Load = void (*)(const void*, int64_t, int64_t, int64_t, Tile, Value*);
template <class Value>
using Store = void (*)(const Value*, void*, int64_t, int64_t, int64_t, Tile);

// Value is the type of the product: double for an f64 weight, else float.
template <class Value>
void prepare(const PrepareWeight& p, int threads) {
  Load<Value> load_w = nullptr, load_mask = nullptr;
  Store<Value> store_out = nullptr;
  with_type<float, double, Bf16, F16>(p.w_dtype, "prepare_weight w", [&](auto tag) {
    load_w = load<Value, typename decltype(tag)::type>;
  });
  with_type<float, double, Bf16, F16, B1>(p.mask_dtype, "prepare_weight mask", [&](auto tag) {
    load_mask = load<Value, typename decltype(tag)::type>;
  });
  with_type<float, double, Bf16, F16>(p.out_dtype, "prepare_weight out", [&](auto tag) {
    store_out = store<Value, typename decltype(tag)::type>;
  });

  const Layout layout = merged(p);
  const Dim &outer = layout.dims[0], &middle = layout.dims[1];
  const Dim &rows = layout.dims[2], &columns = layout.dims[3];
  const int64_t tile_columns = std::min(columns.size, kTile);
  const int64_t tile_rows = kTile / tile_columns;
  const int64_t column_tiles = (columns.size + tile_columns - 1) / tile_columns;
  const int64_t row_tiles = (rows.size + tile_rows - 1) / tile_rows;
  const bool select = p.mask_dtype == DType::b1;

  const int64_t tiles = outer.size * middle.size * row_tiles * column_tiles;
  parallel_for(tiles, 32, threads, [&](int64_t begin, int64_t end) {
    Value w[kTile], mask[kTile];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t column = t % column_tiles * tile_columns, row = t / column_tiles % row_tiles * tile_rows;
      const int64_t plane = t / column_tiles / row_tiles, a = plane / middle.size, b = plane % middle.size;
      const Tile tile{std::min(tile_rows, rows.size - row), std::min(tile_columns, columns.size - column)};
      auto at = [&](int64_t Dim::*stride) {
        return a * outer.*stride + b * middle.*stride + row * rows.*stride + column * columns.*stride;
      };
      load_w(p.w, at(&Dim::w), rows.w, columns.w, tile, w);
      load_mask(p.mask, at(&Dim::mask), rows.mask, columns.mask, tile, mask);
      const int64_t count = tile.rows * tile.columns;
      if (select) {
        for (int64_t i = 0; i < count; ++i) w[i] = mask[i] != 0 ? w[i] : Value(0);
      } else {
        for (int64_t i = 0; i < count; ++i) w[i] *= mask[i];
      }
      store_out(w, p.out, at(&Dim::out), rows.out, columns.out, tile);
    }
  });
}

}  // namespace

void prepare_weight(const PrepareWeight& p, int threads) {
  if (p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3] == 0) return;
  p.w_dtype == DType::f64 ? prepare<double>(p, threads) : prepare<float>(p, threads);
}

}  // namespace rtk::RTK_ISA
