// A depthwise convolution and the 1x1 convolution behind it, channels-last, in one pass over
// memory: a tile of pixels of the depthwise result goes to a buffer in the L2 cache, is multiplied
// with the 1x1 weights there, and is forgotten. In 16-bit types the buffer is fp32, so that the
// intermediate result is not rounded.
//
// The product runs over panels of output channels. Of a panel, kAccumulators vectors (rows x
// vectors) are summed up in registers over the channels, one broadcast and a few weights at a time;
// bound by FMA.
#include "cpu/kernels/depthwise_separable_conv2d.h"

#include <utility>

#include "cpu/kernels/depthwise_nhwc.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16 registers
#endif
constexpr int64_t kTileBytes = 160 * 1024;  // of a common L2 cache of 512 KiB

// The output channels in vectors, and those in panels of 2 vectors. An odd one goes to the last
// panel, which is then 3 wide, as a panel of 1 waits for its loads.
template <class A>
FASTCONV_INLINE int64_t count_vectors(int64_t out_channels) {
  return (out_channels + kLanes<A> - 1) / kLanes<A>;
}
template <class A>
FASTCONV_INLINE int64_t count_panels(int64_t out_channels) {
  return max(count_vectors<A>(out_channels) / 2, 1);
}
template <class A>
struct Panel {
  Panel(int64_t panel, int64_t out_channels)
      : first(2 * kLanes<A> * panel),
        vectors(panel + 1 < count_panels<A>(out_channels) ? 2 : count_vectors<A>(out_channels) - 2 * panel),
        width(min(vectors * kLanes<A>, out_channels - first)) {}
  int64_t first;  // output channel
  int64_t vectors;
  int64_t width;  // in output channels
};

// A tile of the depthwise result times one panel of the weight
template <class A>
struct Product {
  const A* input;   // [rows, channels]
  const A* weight;  // [1 + channels, kVectors vectors]; the first row is the bias
  int64_t channels;
  Bounds<A> bounds;

  // As many rows as fit into the registers. The pitches count elements.
  template <int kVectors, class T>
  FASTCONV_INLINE void some_rows(const A* input, T* output, int64_t output_pitch) const {
    constexpr int kRows = kAccumulators / kVectors;
    constexpr int kStep = kLanes<A>;
    Vec<A> sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 24
      for (int i = 0; i < kRows; ++i) sums[i][v] = load(weight + v * kStep);
    }
    const A* w = weight + kVectors * kStep;
    for (int64_t c = 0; c < channels; ++c, w += kVectors * kStep) {
      Vec<A> weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = load(w + v * kStep);
#pragma GCC unroll 24
      for (int i = 0; i < kRows; ++i) {
        const Vec<A> value = broadcast(input[i * channels + c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += value * weights[v];
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(output + i * output_pitch + v * kStep, bounds.clamp(sums[i][v]));
      }
    }
  }

  // `count` rows, at least as many as some_rows() takes: the last ones overlap those before.
  template <int kVectors, class T>
  void rows(int64_t count, T* output, int64_t output_pitch) const {
    constexpr int64_t kRows = kAccumulators / kVectors;
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t row = min(i, count - kRows);
      some_rows<kVectors>(input + row * channels, output + row * output_pitch, output_pitch);
    }
  }

  template <class T>
  void rows(int64_t vectors, int64_t count, T* output, int64_t output_pitch) const {
    if (vectors == 1) return rows<1>(count, output, output_pitch);
    if (vectors == 2) return rows<2>(count, output, output_pitch);
    return rows<3>(count, output, output_pitch);
  }
};

template <class T>
void fprop(const DepthwiseSeparableConv2dParams& params, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const int64_t channels = params.depthwise.channels;
  const int64_t out_channels = params.out_channels;
  const int64_t fitting = kTileBytes / (channels * static_cast<int64_t>(sizeof(A)));
  const int64_t tile = max(2, min(8, fitting / kAccumulators)) * kAccumulators;
  const Scratch<A> buffer(tile * channels);
  const Scratch<T> ragged(tile * 3 * kLanes<A>);
  __builtin_memset(buffer.data(), 0, kAccumulators * channels * sizeof(A));
  for (int64_t pixel = begin; pixel < end; pixel += tile) {
    const int64_t count = min(tile, end - pixel);
    depthwise_pixels<T>(params.depthwise, pixel, pixel + count, buffer.data());
    for (int64_t i = 0; i < count_panels<A>(out_channels); ++i) {
      const Panel<A> panel(i, out_channels);
      const Product<A> product{.input = buffer.data(),
                               .weight = static_cast<const A*>(params.weight) + panel.first * (1 + channels),
                               .channels = channels,
                               .bounds = Bounds<A>(params.activation)};
      const int64_t width = panel.vectors * kLanes<A>;
      T* output = static_cast<T*>(params.output) + pixel * out_channels + panel.first;
      if (count >= kAccumulators && panel.width == width) {
        product.rows(panel.vectors, count, output, out_channels);
        continue;
      }
      // Too few pixels or channels for whole registers
      product.rows(panel.vectors, max(count, kAccumulators), ragged.data(), width);
      for (int64_t row = 0; row < count; ++row) {
        __builtin_memcpy(output + row * out_channels, ragged.data() + row * width, panel.width * sizeof(T));
      }
    }
  }
}

// Lane j + kStep of vector i and lane j of vector i + kStep change places.
template <class A, int kStep, int... kLane>
FASTCONV_INLINE void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const Vec<A> low = shuffle<A, (kLane & kStep ? kCount + kLane - kStep : kLane)...>(a, b);
  b = shuffle<A, (kLane & kStep ? kCount + kLane : kLane + kStep)...>(a, b);
  a = low;
}

template <class A, int kStep = 1>
FASTCONV_INLINE void transpose(Vec<A>* rows) {
  constexpr int kCount = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kCount>{});
  }
  if constexpr (2 * kStep < kCount) transpose<A, 2 * kStep>(rows);
}

// `count` rows of `weight` (as many as a vector has lanes, or what is left of them) to the columns
// of `packed`
template <class A>
void pack_vector(const A* weight, int64_t channels, int64_t count, A* packed, int64_t width) {
  constexpr int kCount = kLanes<A>;
  int64_t c = 0;
  for (; count == kCount && c + kCount <= channels; c += kCount) {
    Vec<A> rows[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) rows[i] = load(weight + i * channels + c);
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) store(packed + (c + i) * width, rows[i]);
  }
  for (; c < channels; ++c) {
    for (int i = 0; i < kCount; ++i) packed[c * width + i] = i < count ? weight[i * channels + c] : 0;
  }
}

template <class A>
void pack(const PointwisePackParams& params, int64_t begin, int64_t end) {
  const A* weight = static_cast<const A*>(params.weight);
  const A* bias = static_cast<const A*>(params.bias);
  for (int64_t i = begin; i < end; ++i) {
    const Panel<A> panel(i, params.out_channels);
    const int64_t width = panel.vectors * kLanes<A>;
    A* packed = static_cast<A*>(params.packed) + panel.first * (1 + params.channels);
    for (int64_t k = 0; k < width; ++k) {
      packed[k] = bias && k < panel.width ? bias[panel.first + k] : 0;
    }
    for (int64_t k = 0; k < width; k += kLanes<A>) {
      pack_vector(weight + (panel.first + k) * params.channels, params.channels, min(kLanes<A>, panel.width - k),
                  packed + width + k, width);
    }
  }
}

template <class A>
PointwisePackedSize packed_size(const PointwisePackParams& params) {
  return {.elements = count_vectors<A>(params.out_channels) * kLanes<A> * (1 + params.channels),
          .panels = count_panels<A>(params.out_channels)};
}

}  // namespace

void depthwise_separable_conv2d_fprop_nhwc(const DepthwiseSeparableConv2dParams& params, int64_t begin, int64_t end) {
  for_dtype(params.depthwise.dtype, [&](auto element) { fprop<decltype(element)>(params, begin, end); });
}

PointwisePackedSize pointwise_packed_size(const PointwisePackParams& params) {
  return params.is_double ? packed_size<double>(params) : packed_size<float>(params);
}

void pointwise_pack(const PointwisePackParams& params, int64_t begin, int64_t end) {
  params.is_double ? pack<double>(params, begin, end) : pack<float>(params, begin, end);
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
