// Sources: from where the tiles of the GEMM's operands come. A loader belongs to one thread and brings that thread's
// share of each tile, from the depth at which it is told to: it knows the part of an address that the extent decides,
// computes the one that the depth decides once for a tile, and joins the two by one multiplication.
//
//            A                      B
//   fprop    Pixels of the input    Filters
//   dgrad    Pixels of dy           FilterRows
//   wgrad    GradientRows of dy     PixelRows of the input
//
// Pixels and Filters have rows along the depth. The others have a row for each place in the depth, of which every lane
// works out one and hears of the rest by shuffles.
#pragma once

#include <type_traits>

#include "cuda/conv2d/params.h"
#include "cuda/conv2d/sm80/tiles.cuh"
#include "cuda/runtime/divider.cuh"

namespace fastconv::cuda::inline sm80 {

// Offsets in an image count vectors and have 32 bits, which the plan checks; single elements need 64. They are from
// where the first pixel meets the filter's first position, and so are not negative.
template <int kVector>
using Offset = std::conditional_t<kVector == 1, int64_t, uint32_t>;

FASTCONV_DEVICE bool is_inside(const Walk& walk, int h, int w) {
  return static_cast<unsigned>(h) < static_cast<unsigned>(walk.height) &&
         static_cast<unsigned>(w) < static_cast<unsigned>(walk.width);
}

// Where a pixel of the other side meets the image through the filter's first position
template <int kVector>
struct Anchor {
  Offset<kVector> offset;
  int h, w;
};
template <int kVector>
FASTCONV_DEVICE Anchor<kVector> anchor(const Walk& walk, int pixel) {
  const auto [n, row, column] = pixel_at(walk.by_pixels, walk.by_columns, pixel);
  const int h = row * walk.step_h, w = column * walk.step_w;
  const auto offset = static_cast<Offset<kVector>>(n * walk.n + h * walk.h + w * walk.w);
  return {offset, h + walk.first_h, w + walk.first_w};
}

// A position of the filter and a channel
struct Tap {
  int r, s, c;
};
FASTCONV_DEVICE Tap tap(const ConvParams& p, int index) {
  Tap t;
  const int position = divide(p.by_channels, index, t.c);
  t.r = divide(p.by_s, position, t.s);
  return t;
}
// The tap's own part of an address, in vectors
template <int kVector>
FASTCONV_DEVICE int64_t offset(const Walk& walk, const Tap& t) {
  const int64_t channel = kVector == 1 ? t.c * walk.c : t.c / kVector;
  return t.r * walk.tap_row + t.s * walk.tap_column + channel;
}

template <class T, int kVector>
FASTCONV_DEVICE const T* advance(const T* data, Offset<kVector> vectors) {
  return data + static_cast<int64_t>(vectors) * kVector;
}

// A row for each pixel, the taps along the depth
template <class T, class Tile, int kVector, int kThreads>
struct Pixels {
  static constexpr bool kVectors = kVector > 1;
  using Mine = Share<T, Tile, kVector, kThreads>;
  struct ByBits {
    uint32_t offset;
    uint32_t outside;  // of the filter's rows from bit 0, of its columns from bit 16; bit 15 is set
  };
  using Row = std::conditional_t<kVectors, ByBits, Anchor<kVector>>;
  static constexpr uint32_t kNowhere = 1u << 15;

  const ConvParams& p;
  const int pixel, end;  // the first of the tile; of the depth
  const Mine mine;
  Row rows[Mine::kPasses];  // of the group

  FASTCONV_DEVICE Pixels(const ConvParams& params, int group, int first, int end_depth)
      : p(params), pixel(first), end(end_depth) {
    const auto of_group = static_cast<Offset<kVector>>(group * p.walk.group / kVector);
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) {
      const int own = first + mine.row + i * Mine::kRowsAtOnce;
      Anchor<kVector> at = anchor<kVector>(p.walk, min(own, p.extent_a - 1));
      at.offset += of_group;
      if constexpr (kVectors) {
        rows[i] = {at.offset, own < p.extent_a ? outside(at) : ~0u};
      } else {
        rows[i] = at;
      }
    }
  }

  FASTCONV_DEVICE void fetch(unsigned char* tile, int depth) const {
    const int index = depth + mine.column;
    const Tap t = tap(p, index);
    const T* const base = static_cast<const T*>(p.walk.data) + offset<kVector>(p.walk, t) * kVector;
    if constexpr (kVectors) {
      const uint32_t bits = index < end ? 1u << t.r | 65536u << t.s : kNowhere;
#pragma unroll
      for (int i = 0; i < Mine::kPasses; ++i) {
        mine.copy(tile, i, advance<T, kVector>(base, rows[i].offset), (rows[i].outside & bits) == 0);
      }
    } else {
      const int h = t.r * p.walk.tap_h, w = t.s * p.walk.tap_w;
#pragma unroll
      for (int i = 0; i < Mine::kPasses; ++i) {
        const bool exists = index < end && pixel + mine.row + i * Mine::kRowsAtOnce < p.extent_a;
        mine.copy(tile, i, advance<T, kVector>(base, rows[i].offset),
                  exists && is_inside(p.walk, rows[i].h + h, rows[i].w + w));
      }
    }
  }

 private:
  FASTCONV_DEVICE uint32_t outside(const Anchor<kVector>& at) const {
    uint32_t bits = kNowhere;
    for (int r = 0; r < p.rows.positions; ++r) {
      if (static_cast<unsigned>(at.h + r * p.walk.tap_h) >= static_cast<unsigned>(p.walk.height)) bits |= 1u << r;
    }
    for (int s = 0; s < p.columns.positions; ++s) {
      if (static_cast<unsigned>(at.w + s * p.walk.tap_w) >= static_cast<unsigned>(p.walk.width)) bits |= 65536u << s;
    }
    return bits;
  }
};

// Which branch a filter of a group belongs to
FASTCONV_DEVICE int branch_of(const ConvParams& p, int filter) {
  int branch = 0;
  while (filter >= p.first_filter[branch + 1]) ++branch;
  return branch;
}

// A row for each filter, as it lies. Those beyond a branch are copies of its last one, for results that nobody keeps.
template <class T, class Tile, int kVector, int kThreads>
struct Filters {
  using Mine = Share<T, Tile, kVector, kThreads>;
  const ConvParams& p;
  const int end;
  const Mine mine;
  Offset<kVector> rows[Mine::kPasses];  // from the first of the branches' weights

  FASTCONV_DEVICE Filters(const ConvParams& params, int group, int first, int end_depth) : p(params), end(end_depth) {
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) {
      const int filter = min(first + mine.row + i * Mine::kRowsAtOnce, p.extent_b - 1), branch = branch_of(p, filter);
      const int of_branch = p.filters[branch];
      const int64_t row = int64_t{group} * of_branch + min(filter - p.first_filter[branch], of_branch - 1);
      const T* const weight = static_cast<const T*>(p.arg.branch[branch].weight);
      rows[i] = static_cast<Offset<kVector>>((weight - static_cast<const T*>(p.weights) + row * p.depth) / kVector);
    }
  }
  FASTCONV_DEVICE void fetch(unsigned char* tile, int depth) const {
    const int index = depth + mine.column;
    const T* const base = static_cast<const T*>(p.weights) + index;
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) mine.copy(tile, i, advance<T, kVector>(base, rows[i]), index < end);
  }
};

FASTCONV_DEVICE int shuffled(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
FASTCONV_DEVICE uint32_t shuffled(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
FASTCONV_DEVICE int64_t shuffled(int64_t value, int lane) {
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(value), lane);
  const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(value >> 32), lane);
  return static_cast<int64_t>(uint64_t{high} << 32 | low);
}
// The place in the depth that this lane works out, of the tile that begins there
template <class Tile>
FASTCONV_DEVICE int own_row(int depth) {
  static_assert(Tile::kDepth <= 32);
  return depth + static_cast<int>(threadIdx.x) % Tile::kDepth;
}

// A row for each position and filter, the channels along the extent
template <class T, class Tile, int kVector, int kThreads>
struct FilterRows {
  using Mine = Share<T, Tile, kVector, kThreads>;
  const ConvParams& p;
  const int first_filter, end;
  const Mine mine;
  const T* data;  // of this thread's column

  FASTCONV_DEVICE FilterRows(const ConvParams& params, int group, int first, int end_depth)
      : p(params), first_filter(group * params.filters[0]), end(end_depth) {
    data = static_cast<const T*>(p.arg.branch[0].weight) + min(first + mine.column, p.c_group - kVector);
  }
  FASTCONV_DEVICE void fetch(unsigned char* tile, int depth) const {
    const int own = row(own_row<Tile>(depth));
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) {
      const int row = shuffled(own, mine.row + i * Mine::kRowsAtOnce);
      mine.copy(tile, i, data + static_cast<int64_t>(row) * p.c_group, row >= 0);
    }
  }

 private:
  // Of the weight; negative for what is no filter, and beyond the depth
  FASTCONV_DEVICE int row(int index) const {
    const Tap t = tap(p, index);  // whose channels are filters
    const int r = p.rows.first_position + t.r * p.rows.step_position;
    const int s = p.columns.first_position + t.s * p.columns.step_position;
    const int found = ((first_filter + t.c) * p.arg.r + r) * p.arg.s + s;
    return index < end && t.c < p.filters[0] ? found : -1;
  }
};

// A row for each pixel of the gradient, the filters along the extent
template <class T, class Tile, int kVector, int kThreads>
struct GradientRows {
  using Mine = Share<T, Tile, kVector, kThreads>;
  const ConvParams& p;
  const int end;
  const Mine mine;
  const T* data;  // of this thread's column

  FASTCONV_DEVICE GradientRows(const ConvParams& params, int group, int first, int end_depth)
      : p(params), end(end_depth) {
    const int64_t column = min(first + mine.column, p.extent_a - kVector);
    data = static_cast<const T*>(p.arg.grad_output) + (int64_t{group} * p.k_group + column);
  }
  FASTCONV_DEVICE void fetch(unsigned char* tile, int depth) const {
    const Offset<kVector> own = row(own_row<Tile>(depth));
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) {
      const int place = mine.row + i * Mine::kRowsAtOnce;
      mine.copy(tile, i, advance<T, kVector>(data, shuffled(own, place)), depth + place < end);
    }
  }

 private:
  FASTCONV_DEVICE Offset<kVector> row(int pixel) const {
    const auto [n, row, column] = pixel_at(p.walk.by_pixels, p.walk.by_columns, pixel);
    return static_cast<Offset<kVector>>(n * p.gradient.n + row * p.gradient.h + column * p.gradient.w);
  }
};

// A row for each pixel of the gradient, along the extent what meets it through each tap
template <class T, class Tile, int kVector, int kThreads>
struct PixelRows {
  using Mine = Share<T, Tile, kVector, kThreads>;
  const ConvParams& p;
  const int end;
  const Mine mine;
  const T* data;  // of this thread's column
  int h, w;       // of its tap

  FASTCONV_DEVICE PixelRows(const ConvParams& params, int group, int first, int end_depth) : p(params), end(end_depth) {
    const Tap t = tap(p, min(first + mine.column, p.extent_b - kVector));
    data = static_cast<const T*>(p.walk.data) + (group * p.walk.group + offset<kVector>(p.walk, t) * kVector);
    h = t.r * p.walk.tap_h, w = t.s * p.walk.tap_w;
  }
  FASTCONV_DEVICE void fetch(unsigned char* tile, int depth) const {
    const Anchor<kVector> own = anchor<kVector>(p.walk, own_row<Tile>(depth));
#pragma unroll
    for (int i = 0; i < Mine::kPasses; ++i) {
      const int place = mine.row + i * Mine::kRowsAtOnce;
      const bool inside = is_inside(p.walk, shuffled(own.h, place) + h, shuffled(own.w, place) + w);
      mine.copy(tile, i, advance<T, kVector>(data, shuffled(own.offset, place)), depth + place < end && inside);
    }
  }
};

}  // namespace fastconv::cuda::inline sm80
