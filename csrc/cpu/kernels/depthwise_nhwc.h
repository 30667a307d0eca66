// Pixels of a channels-last depthwise convolution with one filter for each channel.
//
// Vectors run along the channels. A tile of neighbouring pixels of one output row is accumulated in
// registers, so that each weight is loaded once for all of them. Where the filter reaches over the
// left or the right edge of the input, a pixel is a tile of its own and leaves out the taps beyond.
// Bound by FMA and loads while the input is in a cache (40 % of the FMA peak measured), else by
// memory.
#pragma once

#include "cpu/kernels/depthwise_conv2d.h"
#include "cpu/kernels/vec.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {

// An input larger than this is hardly in the caches: its rows are then fetched one output row
// ahead, as the short stretches of memory that a tile reads escape the hardware's prefetcher. Twice
// as fast from DRAM at stride 2, and 10 % slower from the L2 cache.
constexpr int64_t kPrefetchBytes = 4 << 20;

// The filter rows (or columns) first ... last - 1 that meet the input at output row `out`
struct Taps {
  Taps(int64_t out, int64_t stride, int64_t padding, int64_t dilation, int64_t filter,
       int64_t size) {
    const int64_t start = out * stride - padding;
    first = start >= 0 ? 0 : min((-start + dilation - 1) / dilation, filter);
    last = start + (filter - 1) * dilation < size
               ? filter
               : max((size - start + dilation - 1) / dilation, first);
  }
  int64_t first, last;
};

// One output row. T is the type of the input's elements, O that of the output's.
template <class T, class O>
class DepthwiseRow {
  using A = Compute<T>;
  using V = Vec<A>;

 public:
  DepthwiseRow(const DepthwiseConv2dParams& params, int64_t image, int64_t row)
      : params_(params),
        bounds_(params.activation),
        prefetches_(params.batch * params.height * params.width * params.channels *
                        static_cast<int64_t>(sizeof(T)) >
                    kPrefetchBytes),
        rows_(row, params.stride_height, params.padding_height, params.dilation_height,
              params.filter_height, params.height),
        top_(static_cast<const T*>(params.input) +
             (image * params.height + row * params.stride_height - params.padding_height) *
                 params.width * params.channels) {}

  // Columns begin ... end - 1; `output` belongs to column `begin`.
  void operator()(int64_t begin, int64_t end, O* output) const {
    const int64_t reach = (params_.filter_width - 1) * params_.dilation_width;
    while (begin < end) {
      // Columns from here on whose filter lies inside of the row
      const int64_t start = begin * params_.stride_width - params_.padding_width;
      const int64_t room = params_.width - 1 - reach - start;
      const int64_t inside =
          start < 0 || room < 0 ? 0 : min(room / params_.stride_width + 1, end - begin);
      const int64_t pixels = inside >= 6 ? 6 : inside >= 4 ? 4 : inside >= 2 ? 2 : 1;
      if (pixels == 6) {
        params_.filter_width == 3 ? tile<6, 3>(begin, output) : tile<6>(begin, output);
      } else if (pixels == 4) {
        tile<4>(begin, output);
      } else if (pixels == 2) {
        tile<2>(begin, output);
      } else {
        tile<1>(begin, output);
      }
      begin += pixels;
      output += pixels * params_.channels;
    }
  }

 private:
  // Where the operands of a tile lie, in elements, for one vector of channels
  struct Window {
    int64_t rows, columns;  // of the filter
    int64_t input_row, input_column, input_pixel;
    int64_t weight_row, weight_column;
    int64_t output_pixel;
    // The input's part under the tile that the next output row will be the first to read
    int64_t ahead, ahead_rows, ahead_row, ahead_columns, ahead_column;
  };

  // kColumns: the columns of the filter if they are known to be that many and all inside, else 0
  template <int kPixels, int kColumns = 0>
  void tile(int64_t column, O* output) const {
    // 12 accumulators of 16 registers; a single pixel has 4, and lets the CPU overlap the blocks.
    constexpr int kVectors = kPixels == 1 ? 4 : 2;
    constexpr int kStep = kVectors * kLanes<A>;
    const int64_t channels = params_.channels;
    const Taps columns(column, params_.stride_width, params_.padding_width, params_.dilation_width,
                       params_.filter_width, params_.width);
    const int64_t row_pitch = params_.width * channels;
    const Window window{
        .rows = rows_.last - rows_.first,
        .columns = columns.last - columns.first,
        .input_row = params_.dilation_height * row_pitch,
        .input_column = params_.dilation_width * channels,
        .input_pixel = params_.stride_width * channels,
        .weight_row = params_.filter_width * channels,
        .weight_column = channels,
        .output_pixel = channels,
        .ahead = (rows_.last - rows_.first - 1) * params_.dilation_height * row_pitch + row_pitch,
        .ahead_rows = prefetches_ ? params_.stride_height : 0,
        .ahead_row = row_pitch,
        .ahead_columns = kPixels * params_.stride_width,
        .ahead_column = channels};
    const T* x = top_ + rows_.first * window.input_row + columns.first * window.input_column +
                 (column * params_.stride_width - params_.padding_width) * channels;
    const A* w = static_cast<const A*>(params_.weight) + rows_.first * window.weight_row +
                 columns.first * window.weight_column;
    const A* bias = static_cast<const A*>(params_.bias);
    int64_t c = 0;
    for (; c + kStep <= channels; c += kStep) {
      block<kPixels, kVectors, kColumns>(window, x + c, w + c, bias ? bias + c : nullptr,
                                         output + c, Whole{});
    }
    for_each_vector<A>(channels - c, [&](int64_t rest, auto part) {
      const int64_t i = c + rest;
      block<kPixels, 1, kColumns>(window, x + i, w + i, bias ? bias + i : nullptr, output + i,
                                  part);
    });
  }

  template <int kPixels, int kVectors, int kColumns, class Part>
  FASTCONV_INLINE void block(const Window& window, const T* x, const A* w, const A* bias, O* output,
                             Part part) const {
    V sums[kPixels][kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V start = bias ? load(bias + v * kLanes<A>, part) : V{};
#pragma GCC unroll 8
      for (int pixel = 0; pixel < kPixels; ++pixel) sums[pixel][v] = start;
    }
    for (int64_t row = 0; row < window.ahead_rows; ++row) {
      const T* ahead = x + window.ahead + row * window.ahead_row;
      for (int64_t column = 0; column < window.ahead_columns; ++column) {
        __builtin_prefetch(ahead + column * window.ahead_column, 0, 2);
      }
    }
    for (int64_t r = 0; r < window.rows; ++r, x += window.input_row, w += window.weight_row) {
      const T* tap = x;
      const A* weight = w;
      const int64_t columns = kColumns ? kColumns : window.columns;
      for (int64_t s = 0; s < columns; ++s) {
        V weights[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) weights[v] = load(weight + v * kLanes<A>, part);
#pragma GCC unroll 8
        for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sums[pixel][v] +=
                load(tap + pixel * window.input_pixel + v * kLanes<A>, part) * weights[v];
          }
        }
        tap += window.input_column;
        weight += window.weight_column;
      }
    }
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(output + pixel * window.output_pixel + v * kLanes<A>, bounds_.clamp(sums[pixel][v]),
              part);
      }
    }
  }

  const DepthwiseConv2dParams& params_;
  Bounds<A> bounds_;
  bool prefetches_;
  Taps rows_;
  const T* top_;  // the input row under the first row of the filter, which may lie outside
};

// The pixels begin ... end - 1 of batch * P * Q; `output` belongs to pixel `begin`.
template <class T, class O>
void depthwise_pixels(const DepthwiseConv2dParams& params, int64_t begin, int64_t end, O* output) {
  while (begin < end) {
    const int64_t column = begin % params.out_width;
    const int64_t row = begin / params.out_width;
    const int64_t count = min(params.out_width - column, end - begin);
    const DepthwiseRow<T, O> pixels(params, row / params.out_height, row % params.out_height);
    pixels(column, column + count, output);
    output += count * params.channels;
    begin += count;
  }
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
