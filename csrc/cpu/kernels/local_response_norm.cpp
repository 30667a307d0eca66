// Local response normalisation across channels (Krizhevsky, Sutskever, Hinton 2012, section 3.3):
//
//   s_c = sum of x_j^2 over the window of c      d_c = k + alpha / size * s_c      y_c = x_c / d_c^beta
//   dx_i = g_i / d_i^beta - 2 alpha beta / size * x_i * sum over {j: i in the window of j} of t_j
//   t_j = g_j x_j / (d_j^beta d_j)
//
// x is the input, or what an activation makes of it whenever it is loaded; dx is then 0 where x lets no gradient pass.
//
// One pass over memory, and nothing but the input is needed for the gradient. Each sum is taken afresh from
// its own terms (a running sum would let a NaN or a cancellation leak out of its window); they come
// from the L1 cache. For NCHW the vectors run along the pixels of a plane, in blocks of which a
// window of channels fits into L1; for channels-last (inner == 1) along the channels of a pixel,
// through a row of squares with zeros at both ends.
#include "cpu/kernels/local_response_norm.h"

#include "cpu/kernels/vec.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {
namespace {

constexpr int64_t kBlockBytes = 16 * 1024;  // half of a common L1 cache

// Out of line, as hardly any network asks for it
__attribute__((noinline)) VecF32 any_power(VecF32 d, double beta) {
  for (int i = 0; i < kLanes<float>; ++i) d[i] = __builtin_powf(d[i], static_cast<float>(beta));
  return d;
}
__attribute__((noinline)) VecF64 any_power(VecF64 d, double beta) {
  for (int i = 0; i < kLanes<double>; ++i) d[i] = __builtin_pow(d[i], beta);
  return d;
}

// d^beta, for any d as pow() gives it
template <class V>
FASTCONV_INLINE V power(V d, double beta) {
  if (beta != 0.75) return any_power(d, beta);
  const V root = sqrt(d);
  return root * sqrt(root);  // unlike sqrt(d * d * d), this overflows only where the result does
}

// The `Bounds` of no activation, at no cost
struct NoBounds {
  template <class V>
  FASTCONV_INLINE V clamp(V v) const {
    return v;
  }
  template <class V>
  FASTCONV_INLINE V mask(V grad, V) const {
    return grad;
  }
};

// The sum of rows[0], rows[pitch], ... of `count` rows, `term` of each, for kUnroll vectors side by side
template <int kUnroll, class T, class Part, class Term>
FASTCONV_INLINE void sum_rows(const T* rows, int64_t pitch, int64_t count, Part part, const Term& term,
                              Vec<Compute<T>>* sums) {
  constexpr int kStep = kLanes<Compute<T>>;
  for (int u = 0; u < kUnroll; ++u) sums[u] = Vec<Compute<T>>{};
  for (int64_t row = 0; row < count; ++row, rows += pitch) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) sums[u] += term(load(rows + u * kStep, part));
  }
}

// f(i, part, sum) for all vectors of a row of `width` columns, with the sum of term(row) over `count` rows
template <class T, class Term, class F>
FASTCONV_INLINE void for_each_sum(const T* rows, int64_t pitch, int64_t count, int64_t width, const Term& term, F&& f) {
  using A = Compute<T>;
  constexpr int kUnroll = 4;
  constexpr int kStep = kLanes<A>;
  Vec<A> sums[kUnroll];
  int64_t i = 0;
  for (; i + kUnroll * kStep <= width; i += kUnroll * kStep) {
    sum_rows<kUnroll>(rows + i, pitch, count, Whole{}, term, sums);
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) f(i + u * kStep, Whole{}, sums[u]);
  }
  for_each_vector<A>(width - i, [&](int64_t rest, auto part) {
    sum_rows<1>(rows + i + rest, pitch, count, part, term, sums);
    f(i + rest, part, sums[0]);
  });
}

struct Itself {
  template <class V>
  FASTCONV_INLINE V operator()(V v) const {
    return v;
  }
};

template <class B>
struct SquareWithin {
  template <class V>
  FASTCONV_INLINE V operator()(V v) const {
    v = bounds.clamp(v);
    return v * v;
  }
  B bounds;
};

template <class A>
struct Coefficients {
  explicit Coefficients(const LocalResponseNormParams& params)
      : scale(static_cast<A>(params.scale)),
        k(static_cast<A>(params.k)),
        slope(static_cast<A>(2 * params.scale * params.beta)) {}
  A scale, k, slope;
};

template <class T, class B>
void fprop_planes(const LocalResponseNormParams& params, const B& bounds, const T* x, T* y, int64_t width) {
  const Coefficients<Compute<T>> coefficients(params);
  const SquareWithin<B> square{bounds};
  const int64_t pitch = params.inner;
  for (int64_t c = 0; c < params.channels; ++c) {
    const int64_t first = max(c - params.before, 0);
    const int64_t count = min(c + params.after + 1, params.channels) - first;
    const T* row = x + c * pitch;
    T* out = y + c * pitch;
    for_each_sum(x + first * pitch, pitch, count, width, square, [&](int64_t i, auto part, auto sum) {
      const auto d = coefficients.k + coefficients.scale * sum;
      store(out + i, bounds.clamp(load(row + i, part)) / power(d, params.beta), part);
    });
  }
}

// Of each row of x two rows are kept until its window has passed: q = g / d^beta and t = q x / d.
template <class T, class B>
void dgrad_planes(const LocalResponseNormParams& params, const B& bounds, const T* x, const T* g, T* dx, int64_t width,
                  int64_t pitch_t, Compute<T>* scratch) {
  const Coefficients<Compute<T>> coefficients(params);
  const SquareWithin<B> square{bounds};
  const int64_t pitch = params.inner;
  const int64_t rows_t = params.before + 1 + params.after;
  const int64_t rows_q = params.before + 1;
  Compute<T>* const ring_t = scratch;
  Compute<T>* const ring_q = scratch + rows_t * pitch_t;
  for (int64_t c = 0; c < params.channels + params.before; ++c) {
    Compute<T>* const t = ring_t + c % rows_t * pitch_t;
    if (c < params.channels) {
      const int64_t first = max(c - params.before, 0);
      const int64_t count = min(c + params.after + 1, params.channels) - first;
      Compute<T>* const q = ring_q + c % rows_q * pitch_t;
      for_each_sum(x + first * pitch, pitch, count, width, square, [&](int64_t i, auto part, auto sum) {
        const auto d = coefficients.k + coefficients.scale * sum;
        const auto quotient = load(g + c * pitch + i, part) / power(d, params.beta);
        store(q + i, quotient);
        store(t + i, quotient * bounds.clamp(load(x + c * pitch + i, part)) / d);
      });
    } else {
      for (int64_t i = 0; i < width; ++i) t[i] = 0;
    }
    // The last row that row i needs has just come.
    const int64_t i = c - params.before;
    if (i < 0) continue;
    const T* row = x + i * pitch;
    const Compute<T>* q = ring_q + i % rows_q * pitch_t;
    T* out = dx + i * pitch;
    for_each_sum(ring_t, pitch_t, rows_t, width, Itself{}, [&](int64_t column, auto part, auto sum) {
      const auto v = bounds.clamp(load(row + column, part));
      store(out + column, bounds.mask(load(q + column) - coefficients.slope * v * sum, v), part);
    });
  }
}

// The pixels begin ... end - 1 of a channels-last tensor
template <class T, class B>
void fprop_pixels(const LocalResponseNormParams& params, const B& bounds, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const Coefficients<A> coefficients(params);
  const SquareWithin<B> square{bounds};
  const int64_t channels = params.channels;
  const int64_t window = params.before + 1 + params.after;
  Scratch<A> scratch(window + channels + kLanes<A>);
  A* const squares = scratch.data();
  __builtin_memset(squares, 0, (window + channels + kLanes<A>)*sizeof(A));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* x = static_cast<const T*>(params.input) + pixel * channels;
    T* y = static_cast<T*>(params.output) + pixel * channels;
    for_each_vector<A>(channels,
                       [&](int64_t c, auto part) { store(squares + params.before + c, square(load(x + c, part))); });
    for_each_sum(squares, 1, window, channels, Itself{}, [&](int64_t c, auto part, auto sum) {
      const auto d = coefficients.k + coefficients.scale * sum;
      store(y + c, bounds.clamp(load(x + c, part)) / power(d, params.beta), part);
    });
  }
}

template <class T, class B>
void dgrad_pixels(const LocalResponseNormParams& params, const B& bounds, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const Coefficients<A> coefficients(params);
  const SquareWithin<B> square{bounds};
  const int64_t channels = params.channels;
  const int64_t window = params.before + 1 + params.after;
  const int64_t padded = window + channels + kLanes<A>;
  Scratch<A> scratch(3 * padded);
  A* const squares = scratch.data();
  A* const t = squares + padded;
  A* const q = t + padded;
  __builtin_memset(squares, 0, 2 * padded * sizeof(A));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* x = static_cast<const T*>(params.input) + pixel * channels;
    const T* g = static_cast<const T*>(params.grad_output) + pixel * channels;
    T* dx = static_cast<T*>(params.output) + pixel * channels;
    for_each_vector<A>(channels,
                       [&](int64_t c, auto part) { store(squares + params.before + c, square(load(x + c, part))); });
    for_each_sum(squares, 1, window, channels, Itself{}, [&](int64_t c, auto part, auto sum) {
      const auto d = coefficients.k + coefficients.scale * sum;
      const auto quotient = load(g + c, part) / power(d, params.beta);
      store(q + c, quotient);
      store(t + params.after + c, quotient * bounds.clamp(load(x + c, part)) / d, part);
    });
    // Seen from channel i, the windows that hold it are the mirror image of its own.
    for_each_sum(t, 1, window, channels, Itself{}, [&](int64_t c, auto part, auto sum) {
      const auto v = bounds.clamp(load(x + c, part));
      store(dx + c, bounds.mask(load(q + c) - coefficients.slope * v * sum, v), part);
    });
  }
}

// f(offset of the first channel's pixels, how many of them) for blocks of at most `block` pixels
// that share a plane
template <class F>
FASTCONV_INLINE void for_each_block(const LocalResponseNormParams& params, int64_t begin, int64_t end, int64_t block,
                                    F&& f) {
  while (begin < end) {
    const int64_t pixel = begin % params.inner;
    const int64_t width = min(min(block, params.inner - pixel), end - begin);
    f(begin / params.inner * params.channels * params.inner + pixel, width);
    begin += width;
  }
}

// f(T{}, bounds) for the tensors' dtype and the activation
template <class F>
FASTCONV_INLINE void for_dtype_and_bounds(const LocalResponseNormParams& params, F&& f) {
  for_dtype(params.dtype, [&](auto element) {
    if (params.activation == Activation::kNone) {
      f(element, NoBounds{});
    } else {
      f(element, Bounds<Compute<decltype(element)>>(params.activation));
    }
  });
}

}  // namespace

void local_response_norm_fprop(const LocalResponseNormParams& params, int64_t begin, int64_t end) {
  for_dtype_and_bounds(params, [&](auto element, auto bounds) {
    using T = decltype(element);
    if (params.inner == 1) return fprop_pixels<T>(params, bounds, begin, end);
    const int64_t rows = params.before + 1 + params.after + 1;
    const int64_t block = max(kBlockBytes / (rows * static_cast<int64_t>(sizeof(T))), 8 * kLanes<Compute<T>>);
    for_each_block(params, begin, end, block, [&](int64_t offset, int64_t width) {
      fprop_planes(params, bounds, static_cast<const T*>(params.input) + offset,
                   static_cast<T*>(params.output) + offset, width);
    });
  });
}

void local_response_norm_dgrad(const LocalResponseNormParams& params, int64_t begin, int64_t end) {
  for_dtype_and_bounds(params, [&](auto element, auto bounds) {
    using T = decltype(element);
    using A = Compute<T>;
    if (params.inner == 1) return dgrad_pixels<T>(params, bounds, begin, end);
    const int64_t rows = 2 * params.before + 2 + params.after;
    const int64_t fitting = kBlockBytes / (rows * static_cast<int64_t>(sizeof(A)));
    const int64_t block = max(fitting / kLanes<A> * kLanes<A>, 8 * kLanes<A>);
    for_each_block(params, begin, end, block, [&](int64_t offset, int64_t width) {
      Scratch<A> scratch(rows * block);
      __builtin_memset(scratch.data(), 0, rows * block * sizeof(A));
      dgrad_planes(params, bounds, static_cast<const T*>(params.input) + offset,
                   static_cast<const T*>(params.grad_output) + offset, static_cast<T*>(params.output) + offset, width,
                   block, scratch.data());
    });
  });
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
