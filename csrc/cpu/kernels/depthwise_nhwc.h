// Pixels of a channels-last depthwise convolution with one filter for each channel.
//
// Vectors run along the channels. A tile of neighbouring pixels of one output row is accumulated in registers, so that
// each weight is loaded once for all of them. Where the filter reaches over the left or the right edge of the input, a
// pixel is a tile of its own and leaves out the taps beyond. Bound by FMA and loads while the input is in a cache (3x3
// reaches 35 to 50 % of the FMA peak on Zen 3), else by memory.
#pragma once

#include "cpu/kernels/depthwise_conv2d.h"
#include "cpu/kernels/vec.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {

// An input larger than this is hardly in the caches: its rows are then fetched one output row ahead, as the short
// stretches of memory that a tile reads escape the hardware's prefetcher. 1.2 to 1.9 times as fast from DRAM (Zen 3),
// but 10 % slower from a cache.
constexpr int64_t kPrefetchBytes = 4 << 20;

// The filter rows (or columns) first ... last - 1 that meet the input at output row `out`
struct Taps {
  Taps(int64_t out, int64_t stride, int64_t padding, int64_t dilation, int64_t filter, int64_t size) {
    const int64_t start = out * stride - padding;
    first = start >= 0 ? 0 : min((-start + dilation - 1) / dilation, filter);
    last = start + (filter - 1) * dilation < size ? filter : max((size - start + dilation - 1) / dilation, first);
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
        prefetches_(params.batch * params.height * params.width * params.channels * static_cast<int64_t>(sizeof(T)) >
                    kPrefetchBytes),
        rows_(row, params.stride_height, params.padding_height, params.dilation_height, params.filter_height,
              params.height),
        top_(static_cast<const T*>(params.input) +
             (image * params.height + row * params.stride_height - params.padding_height) * params.width *
                 params.channels) {}

  // Columns begin ... end - 1; `output` belongs to column `begin`.
  void operator()(int64_t begin, int64_t end, O* output) const {
    const int64_t channels = params_.channels;
    const int64_t reach = (params_.filter_width - 1) * params_.dilation_width;
    while (begin < end) {
      // Columns from here on whose filter lies inside of the row
      const int64_t start = begin * params_.stride_width - params_.padding_width;
      const int64_t room = params_.width - 1 - reach - start;
      const int64_t inside = start < 0 || room < 0 ? 0 : min(room / params_.stride_width + 1, end - begin);
      const int64_t widest = channels < 2 * kLanes<A> ? 1 : inside;
      const int64_t pixels = widest >= 6 ? 6 : widest >= 4 ? 4 : widest >= 2 ? 2 : 1;
      const Tile tile = make_tile(begin, pixels, output);
      if (pixels == 6) {
        params_.filter_width == 3 ? all_channels<6, 2, 3>(tile, channels) : all_channels<6, 2>(tile, channels);
      } else if (pixels == 4) {
        all_channels<4, 2>(tile, channels);
      } else if (pixels == 2) {
        all_channels<2, 2>(tile, channels);
      } else if (channels >= 4 * kLanes<A>) {
        all_channels<1, 4>(tile, channels);
      } else {
        for_each_vector<A>(channels, [&](int64_t c, auto part) { block<1, 1, 0>(tile, c, part); });
      }
      begin += pixels;
      output += pixels * channels;
    }
  }

 private:
  // Where the operands of a tile lie, in elements
  struct Tile {
    const T* input;
    const A* weight;
    const A* bias;  // or null
    O* output;
    Bounds<A> bounds;
    int64_t rows, columns;  // of the filter
    int64_t input_row, input_column, input_pixel;
    int64_t weight_row, weight_column;
    int64_t output_pixel;
    // The input's part under the tile that the next output row will be the first to read
    const T* ahead;
    int64_t ahead_rows, ahead_row, ahead_columns, ahead_column;
  };

  Tile make_tile(int64_t column, int64_t pixels, O* output) const {
    const int64_t channels = params_.channels;
    const Taps columns(column, params_.stride_width, params_.padding_width, params_.dilation_width,
                       params_.filter_width, params_.width);
    const int64_t row_pitch = params_.width * channels;
    const T* input =
        top_ +
        (column * params_.stride_width - params_.padding_width + columns.first * params_.dilation_width) * channels;
    return {.input = input + rows_.first * params_.dilation_height * row_pitch,
            .weight =
                static_cast<const A*>(params_.weight) + (rows_.first * params_.filter_width + columns.first) * channels,
            .bias = static_cast<const A*>(params_.bias),
            .output = output,
            .bounds = Bounds<A>(params_.activation),
            .rows = rows_.last - rows_.first,
            .columns = columns.last - columns.first,
            .input_row = params_.dilation_height * row_pitch,
            .input_column = params_.dilation_width * channels,
            .input_pixel = params_.stride_width * channels,
            .weight_row = params_.filter_width * channels,
            .weight_column = channels,
            .output_pixel = channels,
            .ahead = input + ((rows_.last - 1) * params_.dilation_height + 1) * row_pitch,
            .ahead_rows = prefetches_ ? min(params_.stride_height, params_.height) : 0,
            .ahead_row = row_pitch,
            .ahead_columns = min(pixels * params_.stride_width, params_.width),
            .ahead_column = channels};
  }

  // All channels, of which there are at least kVectors vectors. The last block overlaps the one
  // before it rather than being ragged.
  // kColumns: the columns of the filter if they are known to be that many, all inside, else 0
  template <int kPixels, int kVectors, int kColumns = 0>
  static void all_channels(const Tile tile, int64_t channels) {
    constexpr int64_t kStep = kVectors * kLanes<A>;
    for (int64_t c = 0; c < channels; c += kStep) {
      block<kPixels, kVectors, kColumns>(tile, min(c, channels - kStep), Whole{});
    }
  }

  template <int kPixels, int kVectors, int kColumns, class Part>
  static FASTCONV_INLINE void block(const Tile& tile, int64_t c, Part part) {
    V sums[kPixels][kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V start = tile.bias ? load(tile.bias + c + v * kLanes<A>, part) : V{};
#pragma GCC unroll 8
      for (int pixel = 0; pixel < kPixels; ++pixel) sums[pixel][v] = start;
    }
    for (int64_t row = 0; row < tile.ahead_rows; ++row) {
      const T* ahead = tile.ahead + row * tile.ahead_row + c;
      for (int64_t column = 0; column < tile.ahead_columns; ++column) {
        __builtin_prefetch(ahead + column * tile.ahead_column, 0, 2);
      }
    }
    const T* x = tile.input + c;
    const A* w = tile.weight + c;
    for (int64_t r = 0; r < tile.rows; ++r, x += tile.input_row, w += tile.weight_row) {
      const T* tap = x;
      const A* weight = w;
      const int64_t columns = kColumns ? kColumns : tile.columns;
      for (int64_t s = 0; s < columns; ++s) {
        V weights[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) weights[v] = load(weight + v * kLanes<A>, part);
#pragma GCC unroll 8
        for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sums[pixel][v] += load(tap + pixel * tile.input_pixel + v * kLanes<A>, part) * weights[v];
          }
        }
        tap += tile.input_column;
        weight += tile.weight_column;
      }
    }
    O* output = tile.output + c;
#pragma GCC unroll 8
    for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(output + pixel * tile.output_pixel + v * kLanes<A>, tile.bounds.clamp(sums[pixel][v]), part);
      }
    }
  }

  const DepthwiseConv2dParams& params_;
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
