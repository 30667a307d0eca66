// Local response normalisation across channels (Krizhevsky, Sutskever, Hinton 2012, section 3.3):
//
//   s_c = sum of x_j^2 over the window of c      d_c = k + alpha / size * s_c      y_c = x_c / d_c^beta
//   dx_i = g_i / d_i^beta - 2 alpha beta / size * x_i * sum over {j: i in the window of j} of t_j
//   t_j = g_j x_j / (d_j^beta d_j)
//
// x is the input, or what an activation makes of it while it is loaded; dx is then 0 where x lets no gradient pass.
// Nothing but the input is needed for the gradient. Every sum is taken afresh from its own terms: a running one would
// let a NaN or a cancellation leak out of its window.
//
// planes: size 5, channels some stride apart (NCHW). A thread owns a vector of pixels and slides along the channels
// with
//         the window in registers; a grid of few pixels is cut along the channels, too.
// rows:   channels side by side (NHWC). A block owns some pixels and all of their channels (or a tile with its halo),
//         a thread a vector of channels; shared memory holds x, and t for the gradient. Its index skips every 33rd
//         word, which keeps the threads' strides of a vector free of bank conflicts.
// wide:   any layout and size, an element to a thread; the caches see to it that memory is read about once. The
//         gradient takes two kernels, with t in a workspace between them.
//
// Bound by memory: x once and y, or x, g and dx.
#include <algorithm>

#include "cuda/kernels/local_response_norm.h"
#include "cuda/kernels/scalar.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedLimit = 48 * 1024;
constexpr int kWindow = 5;

FASTCONV_DEVICE float square_root(float v) { return sqrtf(v); }
FASTCONV_DEVICE double square_root(double v) { return sqrt(v); }
FASTCONV_DEVICE float power(float base, float exponent) { return powf(base, exponent); }
FASTCONV_DEVICE double power(double base, double exponent) { return pow(base, exponent); }

template <class A>
struct Coefficients {
  FASTCONV_DEVICE explicit Coefficients(const LocalResponseNormParams& p)
      : scale(static_cast<A>(p.scale)),
        k(static_cast<A>(p.k)),
        beta(static_cast<A>(p.beta)),
        slope(static_cast<A>(2 * p.scale * p.beta)),
        three_quarters(p.beta == 0.75),
        activation(p.activation) {}
  A scale, k, beta, slope;
  bool three_quarters;
  Activation activation;
};

// dx from its two terms, of which the second lacks a factor
template <class A>
FASTCONV_DEVICE A gradient(A scaled, A x, A sum, const Coefficients<A>& of) {
  return passes_gradient(x, of.activation) ? scaled - of.slope * x * sum : A(0);
}

// v / d^beta for any d as pow() has it. For 16-bit results two approximate roots do; float32 takes exact ones, and
// divides.
template <class T, class A>
FASTCONV_DEVICE A over_power(A v, A d, const Coefficients<A>& of) {
  if (!of.three_quarters) return v / power(d, of.beta);
  if constexpr (sizeof(T) == 2) {
    const float inverse_root = rsqrtf(d);
    return v * (inverse_root * sqrtf(inverse_root));
  } else {
    const A root = square_root(d);
    return v / (root * square_root(root));  // unlike sqrt(d * d * d), this overflows only where the result does
  }
}

// --------------------------------------------------------------------------------------------- planes

template <class T, int kWidth>
struct PlanePosition {
  FASTCONV_DEVICE explicit PlanePosition(const LocalResponseNormParams& p) {
    const int64_t vectors = p.inner / kWidth;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    inside = index < p.outer * vectors;
    offset = index / vectors * p.channels * p.inner + index % vectors * kWidth;
    first = static_cast<int>(blockIdx.y) * p.channels_per_block;
    last = first + p.channels_per_block < p.channels ? first + p.channels_per_block : p.channels;
  }
  bool inside;
  int64_t offset;   // of channel 0
  int first, last;  // channels to compute: first ... last - 1
};

// How many channels are loaded before the first of them is used. The stores between would otherwise keep the loads
// back, and a thread of single elements has too few of them under way.
template <int kWidth>
constexpr int kAhead = kWidth > 1 ? 2 : 4;

// A row of channel `channel`: zeros where there is none.
template <class T, int kWidth>
FASTCONV_DEVICE Vec<T, kWidth> load_row(const T* rows, int channel, const LocalResponseNormParams& p) {
  Vec<T, kWidth> row{};
  if (channel >= 0 && channel < p.channels) row = load<kWidth>(rows + channel * p.inner);
  return row;
}

// The oldest row drops out, the new one comes in, activated.
template <class T, int kWidth>
FASTCONV_DEVICE void slide(Compute<T> (&window)[kWindow][kWidth], const Vec<T, kWidth>& row, Activation activation) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
#pragma unroll
    for (int w = 0; w + 1 < kWindow; ++w) window[w][i] = window[w + 1][i];
    window[kWindow - 1][i] = activate(widen(row.v[i]), activation);
  }
}

template <bool kSquares, class A, int kWidth>
FASTCONV_DEVICE A sum_window(const A (&window)[kWindow][kWidth], int i) {
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kWindow; ++w) {
    sum = kSquares ? fused_multiply_add(window[w][i], window[w][i], sum) : sum + window[w][i];
  }
  return sum;
}

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
fprop_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  constexpr int kReach = kWindow / 2;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const T* x = static_cast<const T*>(p.input) + at.offset;
  T* y = static_cast<T*>(p.output) + at.offset;
  A window[kWindow][kWidth];
#pragma unroll
  for (int c = -kReach; c < kReach; ++c) slide(window, load_row<T, kWidth>(x, at.first + c, p), p.activation);
  for (int begin = at.first; begin < at.last; begin += kAhead<kWidth>) {
    Vec<T, kWidth> rows[kAhead<kWidth>];
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) rows[a] = load_row<T, kWidth>(x, begin + a + kReach, p);
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      const int c = begin + a;
      if (c >= at.last) break;
      slide(window, rows[a], p.activation);
      A out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A d = fused_multiply_add(of.scale, sum_window<true>(window, i), of.k);
        out[i] = over_power<T>(window[kReach][i], d, of);
      }
      store_narrow(y + c * p.inner, out);
    }
  }
}

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
dgrad_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  constexpr int kReach = kWindow / 2;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const T* x = static_cast<const T*>(p.input) + at.offset;
  const T* g = static_cast<const T*>(p.grad_output) + at.offset;
  T* dx = static_cast<T*>(p.output) + at.offset;
  A window[kWindow][kWidth];     // x of j - 2 ... j + 2
  A terms[kWindow][kWidth];      // t of j - 4 ... j
  A scaled[kReach + 1][kWidth];  // g / d^beta of j - 2 ... j
#pragma unroll
  for (int c = -2 * kReach; c < 0; ++c) slide(window, load_row<T, kWidth>(x, at.first + c, p), p.activation);
  const int end = at.last + kReach;
  for (int begin = at.first - kReach; begin < end; begin += kAhead<kWidth>) {
    Vec<T, kWidth> rows[kAhead<kWidth>], grads[kAhead<kWidth>];
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      rows[a] = load_row<T, kWidth>(x, begin + a + kReach, p);
      grads[a] = load_row<T, kWidth>(g, begin + a, p);
    }
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      const int j = begin + a;
      if (j >= end) break;
      slide(window, rows[a], p.activation);
      const bool exists = j >= 0 && j < p.channels;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
#pragma unroll
        for (int w = 0; w + 1 < kWindow; ++w) terms[w][i] = terms[w + 1][i];
#pragma unroll
        for (int w = 0; w < kReach; ++w) scaled[w][i] = scaled[w + 1][i];
        A q = 0, t = 0;
        if (exists) {
          const A d = fused_multiply_add(of.scale, sum_window<true>(window, i), of.k);
          q = over_power<T>(widen(grads[a].v[i]), d, of);
          t = q * window[kReach][i] / d;
        }
        terms[kWindow - 1][i] = t;
        scaled[kReach][i] = q;
      }
      // The last t that channel j - 2 needs has just come.
      const int c = j - kReach;
      if (c < at.first) continue;
      A out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        out[i] = gradient(scaled[0][i], window[0][i], sum_window<false>(terms, i), of);
      }
      store_narrow(dx + c * p.inner, out);
    }
  }
}

// ----------------------------------------------------------------------------------------------- rows

// Where word i of a row is kept
FASTCONV_HOST_DEVICE int slot(int i) { return i + i / 32; }

// A block's row of a pixel: `tile` channels from `first`, and a halo on both sides
struct RowTile {
  FASTCONV_DEVICE explicit RowTile(const LocalResponseNormParams& p, int width)
      : tile(static_cast<int>(blockDim.x) * width), first(static_cast<int>(blockIdx.y) * tile) {
    pixel = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    inside = pixel < p.outer;
  }
  int tile, first;
  int64_t pixel;
  bool inside;
};

// x of the channels first - before ... first + tile + after - 1 into `row`; own: this thread's part of the tile
template <class T, int kWidth>
FASTCONV_DEVICE void fill_row(Compute<T>* row, Compute<T> (&own)[kWidth], const T* input, const RowTile& at, int before,
                              int after, const LocalResponseNormParams& p) {
  const int c = at.first + static_cast<int>(threadIdx.x) * kWidth;
  load_wide_if(at.inside && c < p.channels, input + c, own);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    own[i] = activate(own[i], p.activation);
    row[slot(before + c - at.first + i)] = own[i];
  }
  for (int h = threadIdx.x; h < before + after; h += blockDim.x) {
    const int position = h < before ? h : h + at.tile;
    const int channel = at.first - before + position;
    const bool exists = at.inside && channel >= 0 && channel < p.channels;
    row[slot(position)] = exists ? activate(widen(input[channel]), p.activation) : Compute<T>(0);
  }
}

// The sums of `count` words (or their squares) from position + 0, position + 1, ... . kSize: the count if known, which
// saves reading a word once for each sum it is in
template <bool kSquares, int kSize, class A, int kWidth>
FASTCONV_DEVICE void sum_row(const A* row, int position, int count, A (&sums)[kWidth]) {
  if constexpr (kSize > 0) {
    A words[kSize + kWidth - 1];
#pragma unroll
    for (int i = 0; i < kSize + kWidth - 1; ++i) {
      words[i] = row[slot(position + i)];
      if (kSquares) words[i] *= words[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[i] = words[i];
#pragma unroll
      for (int w = 1; w < kSize; ++w) sums[i] += words[i + w];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = 0;
    for (int w = 0; w < count; ++w) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A word = row[slot(position + w + i)];
        sums[i] = kSquares ? fused_multiply_add(word, word, sums[i]) : sums[i] + word;
      }
    }
  }
}

FASTCONV_HOST_DEVICE int row_words(int length) { return slot(length - 1) + 1; }

template <class T, int kWidth, int kSize>
FASTCONV_KERNEL(kThreads, 4)
fprop_rows(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const RowTile at(p, kWidth);
  A* row = dynamic_smem<A>() + threadIdx.y * row_words(p.before + at.tile + p.after);
  const T* x = static_cast<const T*>(p.input) + at.pixel * p.channels;
  A own[kWidth];
  fill_row(row, own, x, at, p.before, p.after, p);
  __syncthreads();
  const int offset = static_cast<int>(threadIdx.x) * kWidth;
  if (!at.inside || at.first + offset >= p.channels) return;
  const Coefficients<A> of(p);
  A sums[kWidth];
  sum_row<true, kSize>(row, offset, p.before + 1 + p.after, sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i] = over_power<T>(own[i], fused_multiply_add(of.scale, sums[i], of.k), of);
  store_narrow(static_cast<T*>(p.output) + at.pixel * p.channels + at.first + offset, own);
}

template <class T, int kWidth, int kSize>
FASTCONV_KERNEL(kThreads, 3)
dgrad_rows(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const RowTile at(p, kWidth);
  const int halo = p.before + p.after, window = halo + 1;
  // Seen from channel i, the windows that hold it are the mirror image of its own: t reaches `after` to the left.
  const int x_words = row_words(at.tile + 2 * halo), t_words = row_words(at.tile + halo);
  A* x_row = dynamic_smem<A>() + threadIdx.y * (x_words + t_words);  // from channel first - halo
  A* t_row = x_row + x_words;                                        // from channel first - after
  const int64_t start = at.pixel * p.channels;
  const T* x = static_cast<const T*>(p.input) + start;
  const T* g = static_cast<const T*>(p.grad_output) + start;
  const int offset = static_cast<int>(threadIdx.x) * kWidth;
  const bool inside = at.inside && at.first + offset < p.channels;
  A own[kWidth], scaled[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scaled[i] = 0;
  if (inside) load_wide(g + at.first + offset, scaled);
  fill_row(x_row, own, x, at, halo, halo, p);
  __syncthreads();

  const Coefficients<A> of(p);
  A sums[kWidth];
  if (inside) {
    sum_row<true, kSize>(x_row, offset + p.after, window, sums);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const A d = fused_multiply_add(of.scale, sums[i], of.k);
      scaled[i] = over_power<T>(scaled[i], d, of);
      sums[i] = scaled[i] * own[i] / d;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) t_row[slot(p.after + offset + i)] = sums[i];
  for (int h = threadIdx.x; h < halo; h += blockDim.x) {
    const int position = h < p.after ? h : h + at.tile;
    const int channel = at.first - p.after + position;
    A t = 0;
    if (at.inside && channel >= 0 && channel < p.channels) {
      A sum[1];
      sum_row<true, kSize>(x_row, position, window, sum);
      const A d = fused_multiply_add(of.scale, sum[0], of.k);
      t = over_power<T>(widen(g[channel]), d, of) * x_row[slot(position + p.before)] / d;
    }
    t_row[slot(position)] = t;
  }
  __syncthreads();

  if (!inside) return;
  sum_row<false, kSize>(t_row, offset, window, sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i] = gradient(scaled[i], own[i], sums[i], of);
  store_narrow(static_cast<T*>(p.output) + start + at.first + offset, own);
}

// ----------------------------------------------------------------------------------------------- wide

// Where an element lies and which channel's it is
struct WidePosition {
  FASTCONV_DEVICE explicit WidePosition(const LocalResponseNormParams& p) {
    index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    inside = index < p.outer * p.channels * p.inner;
    channel = static_cast<int>(index / p.inner % p.channels);
  }
  int64_t index;
  int channel;
  bool inside;
};

// x of the element `offset` further
template <class T>
FASTCONV_DEVICE Compute<T> wide_x(const LocalResponseNormParams& p, const WidePosition& at, int64_t offset = 0) {
  return activate(widen(static_cast<const T*>(p.input)[at.index + offset]), p.activation);
}

// d of the element at
template <class T>
FASTCONV_DEVICE Compute<T> wide_denominator(const LocalResponseNormParams& p, const WidePosition& at,
                                            const Coefficients<Compute<T>>& of) {
  const int first = at.channel < p.before ? -at.channel : -p.before;
  const int last = at.channel + p.after < p.channels ? p.after : p.channels - 1 - at.channel;
  Compute<T> sum = 0;
  for (int c = first; c <= last; ++c) {
    const Compute<T> v = wide_x<T>(p, at, c * p.inner);
    sum = fused_multiply_add(v, v, sum);
  }
  return fused_multiply_add(of.scale, sum, of.k);
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
fprop_wide(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<Compute<T>> of(p);
  const Compute<T> d = wide_denominator<T>(p, at, of);
  static_cast<T*>(p.output)[at.index] = narrow<T>(over_power<T>(wide_x<T>(p, at), d, of));
}

// t into the workspace
template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_terms(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<Compute<T>> of(p);
  const Compute<T> d = wide_denominator<T>(p, at, of);
  const Compute<T> q = over_power<T>(widen(static_cast<const T*>(p.grad_output)[at.index]), d, of);
  static_cast<Compute<T>*>(p.workspace)[at.index] = q * wide_x<T>(p, at) / d;
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_sums(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const A d = wide_denominator<T>(p, at, of);
  const A q = over_power<T>(widen(static_cast<const T*>(p.grad_output)[at.index]), d, of);
  const A* t = static_cast<const A*>(p.workspace) + at.index;
  const int first = at.channel < p.after ? -at.channel : -p.after;
  const int last = at.channel + p.before < p.channels ? p.before : p.channels - 1 - at.channel;
  A sum = 0;
  for (int c = first; c <= last; ++c) sum += t[c * p.inner];
  static_cast<T*>(p.output)[at.index] = narrow<T>(gradient(q, wide_x<T>(p, at), sum, of));
}

// ------------------------------------------------------------------------------------------- launchers

// Rows: channels of a tile in vectors of `width`, and pixels of a block
dim3 rows_block(const LocalResponseNormParams& p, int width) {
  const int64_t vectors = p.channels / width;
  const int64_t x = ceil_div(vectors, ceil_div(vectors, kThreads));
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x));
}

int64_t rows_shared_bytes(const LocalResponseNormParams& p, int width, bool backward) {
  const dim3 block = rows_block(p, width);
  const int64_t tile = int64_t{block.x} * width, halo = int64_t{p.before} + p.after;
  const auto words = [](int64_t length) { return length + (length - 1) / 32; };
  const int64_t row = backward ? words(tile + 2 * halo) + words(tile + halo) : words(tile + halo);
  return row * block.y * (p.dtype == DType::kFloat64 ? 8 : 4);
}

// All heuristics. Vectors need neighbours that are whole vectors, 16-byte aligned; rows need a halo that fits into
// shared memory; planes are for the one size that networks use.
bool takes(const std::string& kernel, const LocalResponseNormParams& p, bool backward) {
  const int width = kernel.ends_with("_vec") ? 16 / element_bytes(p.dtype) : 1;
  const bool aligned = width == 1 || (is_aligned(p.input) && is_aligned(p.grad_output) && is_aligned(p.output));
  if (kernel.find("_nhwc") != std::string::npos) {
    return p.inner == 1 && p.channels % width == 0 && aligned && rows_shared_bytes(p, width, backward) <= kSharedLimit;
  }
  if (kernel.find("_nchw") != std::string::npos) {
    return p.before == kWindow / 2 && p.after == kWindow / 2 && p.inner % width == 0 && aligned;
  }
  return true;  // wide
}

constexpr const char* kFprop = "local_response_norm_fprop";
constexpr const char* kDgrad = "local_response_norm_dgrad";

const KernelInfo& choose(const LocalResponseNormParams& p, bool backward) {
  const std::string stem = backward ? kDgrad : kFprop;
  const std::string names[] = {stem + "_nhwc_vec", stem + "_nhwc", stem + "_nchw_vec", stem + "_nchw", stem + "_wide"};
  if (const char* forced = forced_kernel(stem.c_str())) {
    const KernelInfo& info = find_kernel(local_response_norm_kernels(), forced);
    if (!takes(forced, p, backward)) {
      throw std::runtime_error(std::string("fastconv: kernel ") + forced + " was forced, but needs " + info.needs);
    }
    return info;
  }
  for (const std::string& name : names) {
    // Of pixels that lie alone, a plane's thread would read one element in `channels`.
    if (name.find("_nchw") != std::string::npos && p.inner == 1) continue;
    if (takes(name, p, backward)) return find_kernel(local_response_norm_kernels(), name.c_str());
  }
  return find_kernel(local_response_norm_kernels(), names[4].c_str());
}

template <class T, int kWidth>
void launch_rows(const KernelInfo& info, const LocalResponseNormParams& p, bool backward, Stream stream) {
  const dim3 block = rows_block(p, kWidth);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.outer, block.y)),
                  static_cast<unsigned>(ceil_div(p.channels, int64_t{block.x} * kWidth)));
  const bool known = p.before == kWindow / 2 && p.after == kWindow / 2;
  const auto kernel = backward ? (known ? &dgrad_rows<T, kWidth, kWindow> : &dgrad_rows<T, kWidth, 0>)
                               : (known ? &fprop_rows<T, kWidth, kWindow> : &fprop_rows<T, kWidth, 0>);
  launch(info, kernel, grid, block, rows_shared_bytes(p, kWidth, backward), stream, p);
}

template <bool kBackward, class T, int kWidth>
void launch_planes(const KernelInfo& info, LocalResponseNormParams p, Stream stream) {
  const int64_t blocks = ceil_div(p.outer * (p.inner / kWidth), kThreads);
  // Cut along the channels until the blocks fill the machine; a cut costs reading a halo.
  constexpr int kLeast = 16;
  const int64_t cuts = std::clamp<int64_t>(ceil_div(4 * p.multiprocessors, blocks), 1, ceil_div(p.channels, kLeast));
  p.channels_per_block = static_cast<int>(ceil_div(p.channels, cuts));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.channels, p.channels_per_block)));
  const auto kernel = [] {
    if constexpr (kBackward) {
      return &dgrad_planes<T, kWidth>;
    } else {
      return &fprop_planes<T, kWidth>;
    }
  }();
  launch(info, kernel, grid, dim3(kThreads), 0, stream, p);
}

void launch_kernel(const LocalResponseNormParams& p, bool backward, Stream stream) {
  const KernelInfo& info = choose(p, backward);
  const std::string name = info.name;
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    if (name.ends_with("_nhwc_vec")) {
      launch_rows<T, kVector<T>>(info, p, backward, stream);
    } else if (name.ends_with("_nhwc")) {
      launch_rows<T, 1>(info, p, backward, stream);
    } else if (name.ends_with("_nchw_vec")) {
      if (backward) {
        constexpr int kWidth = std::min(kVector<T>, 4);  // its windows of 8 would not fit into the registers
        launch_planes<true, T, kWidth>(info, p, stream);
      } else {
        launch_planes<false, T, kVector<T>>(info, p, stream);
      }
    } else if (name.ends_with("_nchw")) {
      backward ? launch_planes<true, T, 1>(info, p, stream) : launch_planes<false, T, 1>(info, p, stream);
    } else {
      const dim3 grid(static_cast<unsigned>(ceil_div(p.outer * p.channels * p.inner, kThreads)));
      if (backward) {
        launch(info, &dgrad_wide_terms<T>, grid, dim3(kThreads), 0, stream, p);
        launch(info, &dgrad_wide_sums<T>, grid, dim3(kThreads), 0, stream, p);
      } else {
        launch(info, &fprop_wide<T>, grid, dim3(kThreads), 0, stream, p);
      }
    }
  });
}

}  // namespace

const std::vector<KernelInfo>& local_response_norm_kernels() {
  constexpr const char* kRowsVector = "channels side by side, whole vectors of 16 bytes of them, 16-byte aligned";
  constexpr const char* kRows = "channels side by side, a size whose halo fits into shared memory";
  constexpr const char* kPlanesVector = "size 5, whole vectors of 16 bytes of pixels, 16-byte aligned";
  static const auto entry = [](const char* op, const char* name, int shared_bytes, const char* needs) {
    return KernelInfo{name, op, 80, {0, 0, 0}, 0, kThreads, shared_bytes, needs};
  };
  static const std::vector<KernelInfo> kernels = {
      entry(kFprop, "local_response_norm_fprop_nhwc_vec", -1, kRowsVector),
      entry(kFprop, "local_response_norm_fprop_nhwc", -1, kRows),
      entry(kFprop, "local_response_norm_fprop_nchw_vec", 0, kPlanesVector),
      entry(kFprop, "local_response_norm_fprop_nchw", 0, "size 5"),
      entry(kFprop, "local_response_norm_fprop_wide", 0, ""),
      entry(kDgrad, "local_response_norm_dgrad_nhwc_vec", -1, kRowsVector),
      entry(kDgrad, "local_response_norm_dgrad_nhwc", -1, kRows),
      entry(kDgrad, "local_response_norm_dgrad_nchw_vec", 0, kPlanesVector),
      entry(kDgrad, "local_response_norm_dgrad_nchw", 0, "size 5"),
      entry(kDgrad, "local_response_norm_dgrad_wide", 0, "a workspace of the tensor's size in float32 (float64)"),
  };
  return kernels;
}

void local_response_norm_fprop(const LocalResponseNormParams& params, Stream stream) {
  launch_kernel(params, false, stream);
}

int64_t local_response_norm_workspace(const LocalResponseNormParams& params) {
  const bool wide = std::string(choose(params, true).name).ends_with("_wide");
  return wide ? params.outer * params.channels * params.inner : 0;
}

void local_response_norm_dgrad(const LocalResponseNormParams& params, Stream stream) {
  launch_kernel(params, true, stream);
}

}  // namespace fastconv::cuda
