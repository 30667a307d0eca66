// The kernel behind conv2d.h. One GEMM, C[extent a, extent b] = sum over depth of A * B, serves the three passes:
//
//            extent a                 extent b                depth
//   fprop    output pixels            filters                 filter positions x channels
//   dgrad    input pixels of a phase  channels                filter positions of the phase x filters
//   wgrad    filters                  positions x channels    output pixels
//
// No matrix is ever built: a `Source` says for each pair of coordinates where the element lies, or that it is padding.
// Tiles pass through a ring of stages in shared memory, then through ldmatrix and mma.sync (16-bit types, TF32) or
// fused multiply-adds (float32), and leave through shared memory so that a pixel's channels are written side by side.
#pragma once

#include "cuda/kernels/conv2d.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace fastconv::cuda {

// ------------------------------------------------------------------------------------------------ parameters

// n / divisor for 0 <= n < 2^31, without a division.
// Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication".
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  FASTCONV_DEVICE int quotient(int n) const {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
  FASTCONV_DEVICE int divide(int n, int& remainder) const {
    const int q = quotient(n);
    remainder = n - q * static_cast<int>(divisor);
    return q;
  }
};

// One phase of dgrad along one axis: with a stride, only every stride-th input pixel meets the same filter positions. A
// GEMM for each phase has no zeros to multiply with. Without a stride there is one phase, which is everything.
struct Phase {
  int first_pixel, step_pixel, pixels;           // of the input
  int first_position, step_position, positions;  // in the filter
};

struct ConvParams {
  ConvArguments arg;
  Phase rows, columns;                  // in dgrad
  int c_group;                          // channels of a group
  int k_group[kMaxBranches];            // filters of a group, in each branch
  int begin[kMaxBranches + 1];          // of each branch along the dimension that the branches share: filters of a
                                        // group in fprop and wgrad, depth in dgrad
  int tile_begin[kMaxBranches + 1];     // of each branch among the tiles along that dimension
  int extent_a, extent_b, depth;        // of the GEMM of a group, all branches together
  int tiles_b, splits, split_depth;     // split_depth: a multiple of the tile's depth
  bool wide;                            // whether results can be written by 16 bytes
  float* workspace;                     // [splits, groups, extent_a, extent_b], then [splits, groups * extent_a]
  Divider by_tiles_b, by_q, by_pixels;  // of the output; by_pixels: p * q
  Divider by_columns, by_phase;         // of the input, in a phase
  Divider by_s, by_c, by_stride_h, by_stride_w;
  Divider by_k[kMaxBranches], by_splits;
};

// --------------------------------------------------------------------------------------------------- sources

// A coordinate that no other one brings back into the image.
constexpr int kOutside = -(1 << 30);

// Where a pixel of the output meets the input; its own part of an address in the input.
struct Anchor {
  int h, w;
  int64_t offset;
};
// A position in the filter and a channel; its own part of an address in the input.
struct Tap {
  int h, w;
  int64_t offset;
};

template <class T>
struct InputSource {
  const ConvParams& p;
  const T* input;  // of the group

  FASTCONV_DEVICE InputSource(const ConvParams& params, int group)
      : p(params), input(static_cast<const T*>(params.arg.input) + group * int64_t{params.c_group} * params.arg.x.c) {}

  FASTCONV_DEVICE Anchor anchor(int pixel, int end) const {
    if (pixel >= end) return {kOutside, kOutside, 0};
    int pq, q;
    const int n = p.by_pixels.divide(pixel, pq);
    const int row = p.by_q.divide(pq, q);
    const int h = row * p.arg.stride_h - p.arg.pad_h, w = q * p.arg.stride_w - p.arg.pad_w;
    return {h, w, n * p.arg.x.n + h * p.arg.x.h + w * p.arg.x.w};
  }
  FASTCONV_DEVICE Tap tap(int index, int end) const {
    if (index >= end) return {kOutside, kOutside, 0};
    int c, s;
    const int position = p.by_c.divide(index, c);
    const int r = p.by_s.divide(position, s);
    const int h = r * p.arg.dilation_h, w = s * p.arg.dilation_w;
    return {h, w, h * p.arg.x.h + w * p.arg.x.w + c * p.arg.x.c};
  }
  FASTCONV_DEVICE const T* at(const Anchor& a, const Tap& t) const {
    const int h = a.h + t.h, w = a.w + t.w;
    const bool inside = h >= 0 && h < p.arg.h && w >= 0 && w < p.arg.w;
    return inside ? input + (a.offset + t.offset) : nullptr;
  }
  FASTCONV_DEVICE const T* anywhere() const { return input; }
};

// A of fprop
template <class T>
struct PixelsByTaps : InputSource<T> {
  using Extent = Anchor;
  using Depth = Tap;
  using InputSource<T>::InputSource;
  FASTCONV_DEVICE Extent extent(int index) const { return this->anchor(index, this->p.extent_a); }
  FASTCONV_DEVICE Depth depth(int index) const { return this->tap(index, this->p.depth); }
  FASTCONV_DEVICE const T* address(const Extent& e, const Depth& d) const { return this->at(e, d); }
};
// B of wgrad
template <class T>
struct TapsByPixels : InputSource<T> {
  using Extent = Tap;
  using Depth = Anchor;
  using InputSource<T>::InputSource;
  FASTCONV_DEVICE Extent extent(int index) const { return this->tap(index, this->p.extent_b); }
  FASTCONV_DEVICE Depth depth(int index) const { return this->anchor(index, this->p.depth); }
  FASTCONV_DEVICE const T* address(const Extent& e, const Depth& d) const { return this->at(d, e); }
};

// B of fprop: the weight as it lies, a row for each filter
template <class T>
struct FiltersByTaps {
  using Extent = int64_t;
  using Depth = int;
  const T* weight;  // of branch and group
  int filters, taps;

  FASTCONV_DEVICE FiltersByTaps(const ConvParams& p, int group, int branch)
      : weight(static_cast<const T*>(p.arg.branch[branch].weight) + int64_t{group} * p.k_group[branch] * p.depth),
        filters(p.k_group[branch]),
        taps(p.depth) {}
  FASTCONV_DEVICE Extent extent(int index) const { return index < filters ? int64_t{index} * taps : -1; }
  FASTCONV_DEVICE Depth depth(int index) const { return index < taps ? index : -1; }
  FASTCONV_DEVICE const T* address(Extent e, Depth d) const { return e >= 0 && d >= 0 ? weight + (e + d) : nullptr; }
  FASTCONV_DEVICE const T* anywhere() const { return weight; }
};

// The depth of dgrad: branch, position in the filter and filter
struct FilterTap {
  int branch, r, s, k;  // branch -1: outside
};
FASTCONV_DEVICE FilterTap filter_tap(const ConvParams& p, int index) {
  if (index >= p.depth) return {-1, 0, 0, 0};
  int branch = 0;
  while (index >= p.begin[branch + 1]) ++branch;
  FilterTap t{branch, 0, 0, 0};
  const int position = p.by_k[branch].divide(index - p.begin[branch], t.k);
  const int row = p.by_s.divide(position, t.s);
  t.r = p.rows.first_position + row * p.rows.step_position;
  t.s = p.columns.first_position + t.s * p.columns.step_position;
  return t;
}

// A of dgrad: which pixel of grad_output saw an input pixel through which position
template <class T>
struct InputPixelsByFilters {
  struct Extent {
    int n, h, w;
  };
  struct Depth {
    int h, w;
    const T* grad;  // null: outside
    const Strides* y;
  };
  const ConvParams& p;
  int group;

  FASTCONV_DEVICE InputPixelsByFilters(const ConvParams& params, int g) : p(params), group(g) {}
  FASTCONV_DEVICE Extent extent(int index) const {
    if (index >= p.extent_a) return {0, kOutside, kOutside};
    int inner, column;
    const int n = p.by_phase.divide(index, inner);
    const int row = p.by_columns.divide(inner, column);
    return {n, p.rows.first_pixel + row * p.rows.step_pixel + p.arg.pad_h,
            p.columns.first_pixel + column * p.columns.step_pixel + p.arg.pad_w};
  }
  FASTCONV_DEVICE Depth depth(int index) const {
    const FilterTap t = filter_tap(p, index);
    if (t.branch < 0) return {0, 0, nullptr, nullptr};
    const ConvBranch& branch = p.arg.branch[t.branch];
    const int64_t k = int64_t{group} * p.k_group[t.branch] + t.k;
    return {t.r * p.arg.dilation_h, t.s * p.arg.dilation_w, static_cast<const T*>(branch.grad_output) + k * branch.y.c,
            &branch.y};
  }
  FASTCONV_DEVICE const T* address(const Extent& e, const Depth& d) const {
    const int h = e.h - d.h, w = e.w - d.w;
    if (d.grad == nullptr || h < 0 || w < 0) return nullptr;
    const int row = p.by_stride_h.quotient(h), column = p.by_stride_w.quotient(w);  // the phase leaves no remainder
    if (row >= p.arg.p || column >= p.arg.q) return nullptr;
    return d.grad + (e.n * d.y->n + row * d.y->h + column * d.y->w);
  }
  FASTCONV_DEVICE const T* anywhere() const { return static_cast<const T*>(p.arg.branch[0].grad_output); }
  // The element of the forward's output that decides over this one of its gradient.
  FASTCONV_DEVICE const T* mask(const T* grad, int depth_index) const {
    const FilterTap t = filter_tap(p, depth_index);
    const ConvBranch& branch = p.arg.branch[t.branch];
    return static_cast<const T*>(branch.output) + (grad - static_cast<const T*>(branch.grad_output));
  }
};

// B of dgrad
template <class T>
struct ChannelsByFilters {
  using Extent = int;
  struct Depth {
    const T* weight;  // null: outside
  };
  const ConvParams& p;
  int group;

  FASTCONV_DEVICE ChannelsByFilters(const ConvParams& params, int g) : p(params), group(g) {}
  FASTCONV_DEVICE Extent extent(int index) const { return index < p.c_group ? index : -1; }
  FASTCONV_DEVICE Depth depth(int index) const {
    const FilterTap t = filter_tap(p, index);
    if (t.branch < 0) return {nullptr};
    const int64_t k = int64_t{group} * p.k_group[t.branch] + t.k;
    const int64_t row = (k * p.arg.r + t.r) * p.arg.s + t.s;
    return {static_cast<const T*>(p.arg.branch[t.branch].weight) + row * p.c_group};
  }
  FASTCONV_DEVICE const T* address(Extent e, const Depth& d) const {
    return e >= 0 && d.weight != nullptr ? d.weight + e : nullptr;
  }
  FASTCONV_DEVICE const T* anywhere() const { return static_cast<const T*>(p.arg.branch[0].weight); }
};

// A of wgrad
template <class T>
struct FiltersByPixels {
  using Extent = int64_t;
  using Depth = int64_t;
  const ConvParams& p;
  const ConvBranch& branch;
  const T* grad;  // of the group
  int filters;

  FASTCONV_DEVICE FiltersByPixels(const ConvParams& params, int group, int b)
      : p(params),
        branch(params.arg.branch[b]),
        grad(static_cast<const T*>(branch.grad_output) + int64_t{group} * params.k_group[b] * branch.y.c),
        filters(params.k_group[b]) {}
  FASTCONV_DEVICE Extent extent(int index) const { return index < filters ? index * branch.y.c : -1; }
  FASTCONV_DEVICE Depth depth(int index) const {
    if (index >= p.depth) return -1;
    int pq, q;
    const int n = p.by_pixels.divide(index, pq);
    const int row = p.by_q.divide(pq, q);
    return n * branch.y.n + row * branch.y.h + q * branch.y.w;
  }
  FASTCONV_DEVICE const T* address(Extent e, Depth d) const { return e >= 0 && d >= 0 ? grad + (e + d) : nullptr; }
  FASTCONV_DEVICE const T* anywhere() const { return grad; }
  FASTCONV_DEVICE const T* mask(const T* element, int) const {
    return static_cast<const T*>(branch.output) + (element - static_cast<const T*>(branch.grad_output));
  }
};

// --------------------------------------------------------------------------------------------- tiles, loaders

// kExtent x kDepth elements in shared memory, one of the two dimensions contiguous. Within a row the 16-byte chunks
// are permuted such that neither ldmatrix nor the fragment loads of float32 meet in a bank.
template <class T, int kExtent_, int kDepth_, bool kDepthContiguous_>
struct Tile {
  static constexpr int kExtent = kExtent_, kDepth = kDepth_;
  static constexpr bool kDepthContiguous = kDepthContiguous_;
  static constexpr int kRow = kDepthContiguous ? kDepth : kExtent;  // elements
  static constexpr int kRows = kDepthContiguous ? kExtent : kDepth;
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kBytes = kExtent * kDepth * sizeof(T);
  static_assert(kDepthContiguous ? kRow * sizeof(T) == 64 : kRow * sizeof(T) % 128 == 0);

  FASTCONV_DEVICE static int swizzle(int row) {
    if constexpr (kDepthContiguous) return row >> 1 & 3;
    return sizeof(T) == 2 ? row & 7 : (row & 3) << 1;
  }
  // Bytes from the start of the tile
  FASTCONV_DEVICE static int offset(int extent, int depth) {
    const int row = kDepthContiguous ? extent : depth, column = kDepthContiguous ? depth : extent;
    return (row * kRow + (column / kChunk ^ swizzle(row)) * kChunk + column % kChunk) * static_cast<int>(sizeof(T));
  }
};

// Brings one tile from where its source says into shared memory, kVector elements at a time.
//
// Asynchronously where that is possible. `kStaged` goes through registers: what `fetch` has read is masked and written
// by `put`, so that the arithmetic between the two hides the way to memory.
template <class T, class Source, class Tile, int kVector, int kThreads, bool kStaged, bool kMasked>
struct Loader {
  static constexpr int kRowVectors = Tile::kRow / kVector;
  static constexpr int kRowsAtOnce = kThreads / kRowVectors;
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % kRowVectors == 0 && Tile::kRows % kRowsAtOnce == 0 && (kStaged || !kMasked));
  using Vector = Vec<T, kVector>;

  const Source source;
  const Activation activation;
  const bool masked;
  const int row, column;
  typename Source::Extent extents[Tile::kDepthContiguous ? kPasses : 1];
  Vector held[kStaged ? kPasses : 1], held_output[kMasked ? kPasses : 1];

  FASTCONV_DEVICE Loader(const Source& s, int first, Activation a, bool has_mask)
      : source(s),
        activation(a),
        masked(has_mask),
        row(threadIdx.x / kRowVectors),
        column(threadIdx.x % kRowVectors * kVector) {
    if constexpr (Tile::kDepthContiguous) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) extents[i] = source.extent(first + row + i * kRowsAtOnce);
    } else {
      extents[0] = source.extent(first + column);
    }
  }

  // Starts to read the tile at this depth; `stage` is its place in shared memory.
  FASTCONV_DEVICE void fetch(unsigned char* stage, int depth) {
    if constexpr (Tile::kDepthContiguous) {
      const auto d = source.depth(depth + column);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) fetch(stage, i, source.address(extents[i], d), depth + column);
    } else {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int index = depth + row + i * kRowsAtOnce;
        fetch(stage, i, source.address(extents[0], source.depth(index)), index);
      }
    }
  }

  // Finishes what `fetch` has started; does nothing for asynchronous copies.
  FASTCONV_DEVICE void put(unsigned char* stage) {
    if constexpr (kStaged) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        Vector value = held[i];
        if constexpr (kMasked) {
          if (masked) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              if (!passes_gradient(to_float(held_output[i].v[v]), activation)) value.v[v] = from_float<T>(0.0f);
            }
          }
        }
        store(reinterpret_cast<T*>(stage + offset(i)), value);
      }
    }
  }

 private:
  FASTCONV_DEVICE int offset(int i) const {
    const int r = row + i * kRowsAtOnce;
    return Tile::kDepthContiguous ? Tile::offset(r, column) : Tile::offset(column, r);
  }
  FASTCONV_DEVICE void fetch(unsigned char* stage, int i, const T* element, int depth_index) {
    if constexpr (kStaged) {
      held[i] = element ? load<kVector>(element) : Vector{};
      if constexpr (kMasked) {
        if (masked) held_output[i] = element ? load<kVector>(source.mask(element, depth_index)) : Vector{};
      }
    } else {
      ptx::cp_async<kVector * sizeof(T)>(ptx::smem_address(stage) + offset(i), element ? element : source.anywhere(),
                                         element != nullptr);
    }
  }
};

// ------------------------------------------------------------------------------------------------ arithmetic

// What a thread holds of a warp's part of C: with g = lane / 4 and t = lane % 4, element e of the 16x8 block (i, j) is
// row 16 i + g + 8 (e / 2), column 8 j + 2 t + e % 2.
template <int kBlocksA, int kBlocksB>
struct Accumulator {
  float v[kBlocksA][kBlocksB][4];
};

// 16-bit types on the tensor cores
template <class T>
struct HalfMath {
  static constexpr int kStep = 16;
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    static_assert(kB % 2 == 0);
    const int lane = threadIdx.x % 32;
    // ldmatrix takes the addresses of rows in memory: of the extent, or, transposed, of the depth.
    const int low = lane & 7, second = (lane >> 3 & 1) * 8, third = (lane >> 4) * 8;
    uint32_t fragments_b[kB][2];
#pragma unroll
    for (int j = 0; j < kB; j += 2) {
      uint32_t both[4];
      if constexpr (TileB::kDepthContiguous) {
        ptx::ldmatrix_x4(both, ptx::smem_address(b + TileB::offset(first_b + j * 8 + third + low, depth + second)));
      } else {
        ptx::ldmatrix_x4_trans(both,
                               ptx::smem_address(b + TileB::offset(first_b + j * 8 + third, depth + second + low)));
      }
      fragments_b[j][0] = both[0], fragments_b[j][1] = both[1];
      fragments_b[j + 1][0] = both[2], fragments_b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      uint32_t fragments_a[4];
      if constexpr (TileA::kDepthContiguous) {
        ptx::ldmatrix_x4(fragments_a,
                         ptx::smem_address(a + TileA::offset(first_a + i * 16 + second + low, depth + third)));
      } else {
        ptx::ldmatrix_x4_trans(fragments_a,
                               ptx::smem_address(a + TileA::offset(first_a + i * 16 + second, depth + third + low)));
      }
#pragma unroll
      for (int j = 0; j < kB; ++j) ptx::mma_m16n8k16<T>(c.v[i][j], fragments_a, fragments_b[j]);
    }
  }
};

FASTCONV_DEVICE float float_at(const unsigned char* tile, int offset) {
  return *reinterpret_cast<const float*>(tile + offset);
}

// float32 on the tensor cores
struct Tf32Math {
  static constexpr int kStep = 8;
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t fragments_b[kB][2];
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        fragments_b[j][i] = ptx::to_tf32(float_at(b, TileB::offset(first_b + j * 8 + g, depth + t + 4 * i)));
      }
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      uint32_t fragments_a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_a + i * 16 + g + e % 2 * 8;
        fragments_a[e] = ptx::to_tf32(float_at(a, TileA::offset(row, depth + t + e / 2 * 4)));
      }
#pragma unroll
      for (int j = 0; j < kB; ++j) ptx::mma_m16n8k8_tf32(c.v[i][j], fragments_a, fragments_b[j]);
    }
  }
};

// float32 as it is
struct FloatMath {
  static constexpr int kStep = 1;
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float rows[kA][2], columns[kB][2];
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) rows[i][e] = float_at(a, TileA::offset(first_a + i * 16 + g + e * 8, depth));
    }
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) columns[j][e] = float_at(b, TileB::offset(first_b + j * 8 + 2 * t + e, depth));
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c.v[i][j][e] = fmaf(rows[i][e / 2], columns[j][e % 2], c.v[i][j][e]);
      }
    }
  }
};

// --------------------------------------------------------------------------------------------------- results

// Which tile of which GEMM a block computes
struct Place {
  int group, split, branch;
  int a, b;            // first row and column within the branch
  int end_a, end_b;    // of the branch
  int base_a, base_b;  // of the branch among all
};

// Where row `a` of a branch's result lies: channel 0 of a pixel, or a filter's gradient.
template <Pass kPass>
FASTCONV_DEVICE int64_t row_offset(const ConvParams& p, const ConvBranch& branch, int group, int branch_index, int a) {
  if constexpr (kPass == Pass::kWgrad) {
    return (int64_t{group} * p.k_group[branch_index] + a) * p.extent_b;
  } else {
    constexpr bool kForward = kPass == Pass::kFprop;
    const Strides& strides = kForward ? branch.y : p.arg.x;
    int inner, column;
    const int n = (kForward ? p.by_pixels : p.by_phase).divide(a, inner);
    int row = (kForward ? p.by_q : p.by_columns).divide(inner, column);
    if constexpr (!kForward) {
      row = p.rows.first_pixel + row * p.rows.step_pixel;
      column = p.columns.first_pixel + column * p.columns.step_pixel;
    }
    return n * strides.n + row * strides.h + column * strides.w;
  }
}

// Bias, residual, activation; then kCount neighbours of a row are written. `sums` are float32 still.
template <Pass kPass, class T, int kCount>
FASTCONV_DEVICE void finish(const ConvParams& p, int group, int branch_index, int64_t row, int b, int end_b,
                            float (&sums)[kCount]) {
  const ConvBranch& branch = p.arg.branch[branch_index];
  T* result = static_cast<T*>(kPass == Pass::kFprop   ? branch.output
                              : kPass == Pass::kDgrad ? p.arg.grad_input
                                                      : branch.grad_weight);
  const int64_t step = kPass == Pass::kFprop ? branch.y.c : kPass == Pass::kDgrad ? p.arg.x.c : 1;
  const int first = b + (kPass == Pass::kFprop   ? group * p.k_group[branch_index]
                         : kPass == Pass::kDgrad ? group * p.c_group
                                                 : 0);
  const bool whole = kCount > 1 && p.wide && b + kCount <= end_b;
  const int64_t offset = row + first * step;
  if constexpr (kPass == Pass::kFprop) {
    const T* bias = static_cast<const T*>(branch.bias);
    const T* residual = static_cast<const T*>(branch.residual);
    if (bias) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (b + i < end_b) sums[i] += to_float(bias[first + i]);
      }
    }
    if (residual && whole) {
      const Vec<T, kCount> others = load<kCount>(residual + offset);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += to_float(others.v[i]);
    } else if (residual) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (b + i < end_b) sums[i] += to_float(residual[offset + i * step]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = activate(sums[i], p.arg.activation);
  }
  if (whole) {
    Vec<T, kCount> rounded;
#pragma unroll
    for (int i = 0; i < kCount; ++i) rounded.v[i] = from_float<T>(sums[i]);
    store(result + offset, rounded);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (b + i < end_b) result[offset + i * step] = from_float<T>(sums[i]);
    }
  }
}

// Where a part of a sum waits for the others, when the depth is split.
FASTCONV_DEVICE float* part(const ConvParams& p, int split, int group, int a, int b) {
  const int64_t row = (int64_t{split} * p.arg.groups + group) * p.extent_a + a;
  return p.workspace + (row * p.extent_b + b);
}
FASTCONV_DEVICE float* bias_part(const ConvParams& p, int split, int group, int a) {
  const int64_t rows = int64_t{p.arg.groups} * p.extent_a;
  return p.workspace + (p.splits * rows * p.extent_b + split * rows + int64_t{group} * p.extent_a + a);
}

// ---------------------------------------------------------------------------------------------------- kernel

template <class T_, class Math_, int kTileA_, int kTileB_, int kWarpsA_, int kWarpsB_, int kStages_, int kVector_>
struct ConvConfig {
  using T = T_;
  using Math = Math_;
  static constexpr int kTileA = kTileA_, kTileB = kTileB_, kWarpsA = kWarpsA_, kWarpsB = kWarpsB_, kStages = kStages_;
  static constexpr int kVector = kVector_;
  static constexpr int kTileDepth = 64 / sizeof(T);
  static constexpr int kThreads = kWarpsA * kWarpsB * 32;
  static constexpr int kWarpA = kTileA / kWarpsA, kWarpB = kTileB / kWarpsB;
  static constexpr int kStageBytes = (kTileA + kTileB) * 64;
  static constexpr int kSlabRow = kWarpB + 4;  // floats; not a multiple of 32, for the banks
  static constexpr int kSlabBytes = kThreads / 32 * 16 * kSlabRow * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSlabBytes ? kStages * kStageBytes : kSlabBytes;
};

template <Pass kPass, class T, class TileConfig>
struct Operands;
template <class T, class C>
struct Operands<Pass::kFprop, T, C> {
  using A = PixelsByTaps<T>;
  using B = FiltersByTaps<T>;
  static constexpr bool kDepthContiguousA = true, kDepthContiguousB = true;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group, at.branch); }
};
template <class T, class C>
struct Operands<Pass::kDgrad, T, C> {
  using A = InputPixelsByFilters<T>;
  using B = ChannelsByFilters<T>;
  static constexpr bool kDepthContiguousA = true, kDepthContiguousB = false;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group); }
};
template <class T, class C>
struct Operands<Pass::kWgrad, T, C> {
  using A = FiltersByPixels<T>;
  using B = TapsByPixels<T>;
  static constexpr bool kDepthContiguousA = false, kDepthContiguousB = false;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group, at.branch); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group); }
};

// Tiles along b are neighbours in the grid: they share A, which is the larger operand, in the L2 cache.
template <Pass kPass, class C>
FASTCONV_DEVICE Place place(const ConvParams& p) {
  Place at{};
  int tile_b;
  int tile_a = p.by_tiles_b.divide(static_cast<int>(blockIdx.x), tile_b);
  at.group = p.by_splits.divide(static_cast<int>(blockIdx.z), at.split);
  at.end_a = p.extent_a, at.end_b = p.extent_b;
  if constexpr (kPass != Pass::kDgrad) {
    int& tile = kPass == Pass::kFprop ? tile_b : tile_a;
    while (tile >= p.tile_begin[at.branch + 1]) ++at.branch;
    tile -= p.tile_begin[at.branch];
    (kPass == Pass::kFprop ? at.base_b : at.base_a) = p.begin[at.branch];
    (kPass == Pass::kFprop ? at.end_b : at.end_a) = p.k_group[at.branch];
  }
  at.a = tile_a * C::kTileA, at.b = tile_b * C::kTileB;
  return at;
}

template <Pass kPass, class C, bool kMasked>
FASTCONV_KERNEL(C::kThreads, 1)
conv2d_kernel(const __grid_constant__ ConvParams p) {
  using T = typename C::T;
  using Ops = Operands<kPass, T, C>;
  using TileA = Tile<T, C::kTileA, C::kTileDepth, Ops::kDepthContiguousA>;
  using TileB = Tile<T, C::kTileB, C::kTileDepth, Ops::kDepthContiguousB>;
  constexpr bool kAsync = C::kVector * sizeof(T) >= 4;
  using LoaderA = Loader<T, typename Ops::A, TileA, C::kVector, C::kThreads, kMasked || !kAsync, kMasked>;
  using LoaderB = Loader<T, typename Ops::B, TileB, C::kVector, C::kThreads, !kAsync, false>;
  constexpr int kBlocksA = C::kWarpA / 16, kBlocksB = C::kWarpB / 8;

  unsigned char* const shared = dynamic_smem<unsigned char>();
  const Place at = place<kPass, C>(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_a = warp / C::kWarpsB * C::kWarpA, warp_b = warp % C::kWarpsB * C::kWarpB;
  const bool has_mask = p.arg.activation != Activation::kNone;
  LoaderA a(Ops::a(p, at), at.a, p.arg.activation, has_mask);
  LoaderB b(Ops::b(p, at), at.b, p.arg.activation, false);

  const int first_depth = at.split * p.split_depth;
  const int depth = min(p.depth - first_depth, p.split_depth);
  const int tiles = (depth + C::kTileDepth - 1) / C::kTileDepth;
  const auto stage = [&](int tile) { return shared + tile % C::kStages * C::kStageBytes; };
  const auto fetch = [&](int tile) {
    a.fetch(stage(tile), first_depth + tile * C::kTileDepth);
    b.fetch(stage(tile) + TileA::kBytes, first_depth + tile * C::kTileDepth);
  };
  const auto put = [&](int tile) {
    a.put(stage(tile));
    b.put(stage(tile) + TileA::kBytes);
  };

#pragma unroll
  for (int tile = 0; tile < C::kStages - 1; ++tile) {
    if (tile < tiles) {
      fetch(tile);
      put(tile);
    }
    ptx::cp_async_commit();
  }
  Accumulator<kBlocksA, kBlocksB> c{};
  [[maybe_unused]] float bias_sum = 0.0f, bias_lost = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<C::kStages - 2>();
    __syncthreads();  // this tile is complete, and everyone is done with the one whose stage comes next
    const int next = tile + C::kStages - 1;
    if (next < tiles) fetch(next);
    ptx::cp_async_commit();
    const unsigned char* const tile_a = stage(tile);
#pragma unroll
    for (int d = 0; d < C::kTileDepth; d += C::Math::kStep) {
      C::Math::template step<TileA, TileB>(c, tile_a, tile_a + TileA::kBytes, warp_a, warp_b, d);
    }
    if constexpr (kPass == Pass::kWgrad) {
      // The tile holds the masked gradient, whose sum is that of the bias; one column of blocks adds it up, with
      // Kahan's compensation, since there may be a million pixels.
      if (at.b == 0 && threadIdx.x < C::kTileA && p.arg.branch[at.branch].grad_bias) {
        float sum = 0.0f;
#pragma unroll
        for (int d = 0; d < C::kTileDepth; ++d) {
          sum += to_float(*reinterpret_cast<const T*>(tile_a + TileA::offset(threadIdx.x, d)));
        }
        const float corrected = sum - bias_lost, total = bias_sum + corrected;
        bias_lost = (total - bias_sum) - corrected;
        bias_sum = total;
      }
    }
    if (next < tiles) put(next);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the stages become slabs

  if constexpr (kPass == Pass::kWgrad) {
    const int filter = at.a + static_cast<int>(threadIdx.x);
    T* grad_bias = static_cast<T*>(p.arg.branch[at.branch].grad_bias);
    if (at.b == 0 && threadIdx.x < C::kTileA && grad_bias && filter < at.end_a) {
      if (p.splits > 1) {
        *bias_part(p, at.split, at.group, at.base_a + filter) = bias_sum;
      } else {
        grad_bias[at.group * p.k_group[at.branch] + filter] = from_float<T>(bias_sum);
      }
    }
  }

  // Each warp turns its part, 16 rows at a time, such that a lane gets neighbours of one row.
  constexpr int kRun = 16 / sizeof(T), kRuns = C::kWarpB / kRun;
  float* const slab = reinterpret_cast<float*>(shared) + warp * 16 * C::kSlabRow;
#pragma unroll
  for (int i = 0; i < kBlocksA; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksB; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        slab[(lane / 4 + e / 2 * 8) * C::kSlabRow + j * 8 + lane % 4 * 2 + e % 2] = c.v[i][j][e];
      }
    }
    __syncwarp();
    for (int run = lane; run < 16 * kRuns; run += 32) {
      const int row = run / kRuns, column = run % kRuns * kRun;
      const int index_a = at.a + warp_a + i * 16 + row, index_b = at.b + warp_b + column;
      if (index_a >= at.end_a || index_b >= at.end_b) continue;
      float sums[kRun];
#pragma unroll
      for (int v = 0; v < kRun; ++v) sums[v] = slab[row * C::kSlabRow + column + v];
      if (p.splits > 1) {
        float* const parts = part(p, at.split, at.group, at.base_a + index_a, at.base_b + index_b);
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          if (index_b + v < at.end_b) parts[v] = sums[v];
        }
      } else {
        const int64_t offset = row_offset<kPass>(p, p.arg.branch[at.branch], at.group, at.branch, index_a);
        finish<kPass, T>(p, at.group, at.branch, offset, index_b, at.end_b, sums);
      }
    }
    __syncwarp();
  }
}

// Adds the parts of a split depth in their order, a thread for each element of the results, then for each bias.
constexpr int kReduceThreads = 256;
template <Pass kPass, class T>
FASTCONV_KERNEL(kReduceThreads, 1)
conv2d_reduce_kernel(const __grid_constant__ ConvParams p) {
  const int64_t rows = int64_t{p.arg.groups} * p.extent_a, elements = rows * p.extent_b;
  const int64_t index = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  const bool is_bias = index >= elements;
  const int64_t row = is_bias ? index - elements : index / p.extent_b;
  if (row >= rows || (is_bias && kPass != Pass::kWgrad)) return;
  const int group = static_cast<int>(row / p.extent_a);
  int a = static_cast<int>(row % p.extent_a), b = is_bias ? 0 : static_cast<int>(index % p.extent_b);
  int branch = 0, end_b = p.extent_b;
  if constexpr (kPass != Pass::kDgrad) {
    const int shared = kPass == Pass::kFprop ? b : a;
    while (shared >= p.begin[branch + 1]) ++branch;
  }
  if (is_bias && p.arg.branch[branch].grad_bias == nullptr) return;
  float sum[1] = {0.0f};
  for (int split = 0; split < p.splits; ++split) {
    sum[0] += is_bias ? *bias_part(p, split, group, a) : *part(p, split, group, a, b);
  }
  if constexpr (kPass == Pass::kWgrad) a -= p.begin[branch];
  if constexpr (kPass == Pass::kFprop) b -= p.begin[branch], end_b = p.k_group[branch];
  if (is_bias) {
    T* grad_bias = static_cast<T*>(p.arg.branch[branch].grad_bias);
    grad_bias[group * p.k_group[branch] + a] = from_float<T>(sum[0]);
  } else {
    finish<kPass, T>(p, group, branch, row_offset<kPass>(p, p.arg.branch[branch], group, branch, a), b, end_b, sum);
  }
}

// ------------------------------------------------------------------------------------------------- launching

// One entry of the table with the means to launch it.
struct ConvVariant {
  KernelInfo info;
  DType dtype;
  bool tf32, masked;  // masked: for an activation's gradient; kernels that gather take both
  int vector;         // elements that are read at once
  void (*run)(const KernelInfo&, const ConvParams&, dim3 grid, Stream);
};

template <Pass kPass, class C, bool kMasked>
void run_conv2d(const KernelInfo& info, const ConvParams& params, dim3 grid, Stream stream) {
  launch(info, &conv2d_kernel<kPass, C, kMasked>, grid, dim3(C::kThreads), C::kSharedBytes, stream, params);
}

template <Pass kPass, class C, bool kMasked>
ConvVariant conv_variant(const char* name, DType dtype, bool tf32, const char* needs) {
  constexpr const char* kOps[] = {"conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad"};
  return {{name,
           kOps[static_cast<int>(kPass)],
           80,
           {C::kTileA, C::kTileB, C::kTileDepth},
           C::kStages,
           C::kThreads,
           C::kSharedBytes,
           needs},
          dtype,
          tf32,
          kMasked,
          C::kVector,
          &run_conv2d<kPass, C, kMasked>};
}

// All variants of a pass for a dtype, in the order of preference for large problems; and its reduction. Instantiated in
// conv2d_<pass>_<dtype>.cu.
template <Pass kPass, DType kDType>
const std::vector<ConvVariant>& conv_variants();
template <Pass kPass, DType kDType>
void run_reduce(const KernelInfo& info, const ConvParams& params, dim3 grid, Stream stream);

}  // namespace fastconv::cuda
