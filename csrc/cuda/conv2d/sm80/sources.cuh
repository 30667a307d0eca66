// Sources: where in the tensors an element of the GEMM's operands lies, for each pass and operand. A source splits an
// address into a part that the coordinate along the extent decides and one that the depth decides (`extent`, `depth`),
// which a loader keeps, and joins the two (`address`): null means padding, or outside of the matrix. `mask` finds the
// output of the activation that belongs to an element of the gradient.
#pragma once

#include "cuda/conv2d/params.h"
#include "cuda/runtime/types.cuh"

namespace fastconv::cuda::inline sm80 {

// n / by for 0 <= n < 2^31
FASTCONV_DEVICE int quotient(const Divider& by, int n) {
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * by.factor >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> by.shift);
}
FASTCONV_DEVICE int divide(const Divider& by, int n, int& remainder) {
  const int q = quotient(by, n);
  remainder = n - q * static_cast<int>(by.divisor);
  return q;
}

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
    const int n = divide(p.by_pixels, pixel, pq);
    const int row = divide(p.by_q, pq, q);
    const int h = row * p.arg.stride_h - p.arg.pad_h, w = q * p.arg.stride_w - p.arg.pad_w;
    return {h, w, n * p.arg.x.n + h * p.arg.x.h + w * p.arg.x.w};
  }
  FASTCONV_DEVICE Tap tap(int index, int end) const {
    if (index >= end) return {kOutside, kOutside, 0};
    int c, s;
    const int position = divide(p.by_c, index, c);
    const int r = divide(p.by_s, position, s);
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
  const int position = divide(p.by_k[branch], index - p.begin[branch], t.k);
  const int row = divide(p.by_s, position, t.s);
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
    const int n = divide(p.by_phase, index, inner);
    const int row = divide(p.by_columns, inner, column);
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
    const int row = quotient(p.by_stride_h, h), column = quotient(p.by_stride_w, w);  // the phase leaves no remainder
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
    const int n = divide(p.by_pixels, index, pq);
    const int row = divide(p.by_q, pq, q);
    return n * branch.y.n + row * branch.y.h + q * branch.y.w;
  }
  FASTCONV_DEVICE const T* address(Extent e, Depth d) const { return e >= 0 && d >= 0 ? grad + (e + d) : nullptr; }
  FASTCONV_DEVICE const T* anywhere() const { return grad; }
  FASTCONV_DEVICE const T* mask(const T* element, int) const {
    return static_cast<const T*>(branch.output) + (element - static_cast<const T*>(branch.grad_output));
  }
};

}  // namespace fastconv::cuda::inline sm80
