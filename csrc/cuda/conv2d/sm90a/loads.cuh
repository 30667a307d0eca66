// The operands of a tile, box by box: one thread has the TMA bring them. Coordinates beyond a tensor bring zeros.
#pragma once

#include "cuda/conv2d/sm90a/tile.cuh"

namespace fastconv::cuda::inline sm90a {

// A position of the filter
struct Position {
  int r, s;
};
FASTCONV_DEVICE int number_in_weight(const BoxParams& p, Position at) {
  return p.first_position + at.r * p.position_row + at.s * p.position_column;
}

// Whether this block brings the j-th box of B, for all blocks of its cluster
template <class C>
FASTCONV_DEVICE bool brings(int j) {
  return C::kCluster == 1 || j % C::kCluster == rank<C>();
}
template <class C>
constexpr uint16_t kAllBlocks = (1 << C::kCluster) - 1;

// A box of an image: pixels from `pixel` on as a position meets them, or of the gradient
template <uint16_t kBlocks = 1>
FASTCONV_DEVICE void load_image(const BoxParams& p, uint32_t to, uint32_t barrier, int c, int pixel, const Pixel& start,
                                Position at) {
  if (p.plain_image) {
    if constexpr (kBlocks == 1) ptx::tma_load_2d(to, p.image, barrier, c, pixel);
    if constexpr (kBlocks > 1) ptx::tma_multicast_2d(to, p.image, barrier, kBlocks, c, pixel);
    return;
  }
  const int w = p.first_w + start.column * p.step_w, h = p.first_h + start.row * p.step_h;
  const int offset_w = p.offset_w + at.s * p.tap_w, offset_h = p.offset_h + at.r * p.tap_h;
  if constexpr (kBlocks == 1) {
    ptx::tma_load_im2col(to, p.image, barrier, c, w, h, start.n, offset_w, offset_h);
  } else {
    ptx::tma_multicast_im2col(to, p.image, barrier, kBlocks, c, w, h, start.n, offset_w, offset_h);
  }
}

// A box of filters at a position
template <uint16_t kBlocks>
FASTCONV_DEVICE void load_filters(const TensorMap& map, uint32_t to, uint32_t barrier, int c, int position,
                                  int filter) {
  if constexpr (kBlocks == 1) {
    ptx::tma_load_3d(to, map, barrier, c, position, filter);
  } else {
    ptx::tma_multicast_3d(to, map, barrier, kBlocks, c, position, filter);
  }
}

template <Pass kPass, class C>
class Loads;

// Pixels and filters: the depth goes through the positions, and through the channels of each.
template <Pass kPass, class C>
  requires(kPass != Pass::kWgrad)
class Loads<kPass, C> {
 public:
  static constexpr ptx::Major kMajorA = ptx::Major::kDepth;
  static constexpr ptx::Major kMajorB = kPass == Pass::kFprop ? ptx::Major::kDepth : ptx::Major::kExtent;

  // Of a pair of tiles the second one may have no pixels: it has the last one, and stores nothing.
  FASTCONV_DEVICE Loads(const BoxParams& params, const Place& place)
      : p(params), at(place), start(pixel_at(p.by_pixels, p.by_columns, min(place.a, p.extent_a - 1))) {
    const int number = divide(p.by_channel_boxes, place.first, channel_box);
    position.r = divide(p.by_s, number, position.s);
  }

  // The next 64 places of the depth
  FASTCONV_DEVICE void next(uint32_t stage, uint32_t barrier) {
    const int c = p.first_channel + channel_box * kBox, number = number_in_weight(p, position);
    load_image(p, stage, barrier, c, at.a, start, position);
#pragma unroll
    for (int j = 0; j < C::kBoxesB; ++j) {
      if (!brings<C>(j)) continue;
      const uint32_t to = stage + C::kBytesA + j * kBoxBytes;
      if constexpr (kPass == Pass::kFprop) {
        const auto [branch, filter] = branch_box(p, at.b / kBox + j);
        load_filters<kAllBlocks<C>>(p.weight[branch], to, barrier, c, number, filter);
      } else {
        load_filters<kAllBlocks<C>>(p.weight[0], to, barrier, at.b + j * kBox, number, c);
      }
    }
    if (++channel_box < p.channel_boxes) return;
    channel_box = 0;
    if (++position.s < p.s) return;
    position.s = 0;
    ++position.r;
  }

 private:
  const BoxParams& p;
  const Place& at;
  const Pixel start;
  Position position;
  int channel_box;
};

// The gradient's filters and the input's channels, at the same pixels: the depth goes through these.
template <class C>
class Loads<Pass::kWgrad, C> {
 public:
  static constexpr ptx::Major kMajorA = ptx::Major::kExtent, kMajorB = ptx::Major::kExtent;

  FASTCONV_DEVICE Loads(const BoxParams& params, const Place& place)
      : p(params), at(place), pixel(place.first * kBox) {}

  FASTCONV_DEVICE void next(uint32_t stage, uint32_t barrier) {
    const Pixel start = pixel_at(p.by_pixels, p.by_columns, pixel);
#pragma unroll
    for (int i = 0; i < C::kTileA / kBox; ++i) {
      const auto [branch, filter] = branch_box(p, at.a / kBox + i);
      const int c = p.first_filter[branch] + filter;
      if (p.plain_gradient) {
        ptx::tma_load_2d(stage + i * kBoxBytes, p.gradient, barrier, c, pixel);
      } else {
        ptx::tma_load_im2col(stage + i * kBoxBytes, p.gradient, barrier, c, start.column, start.row, start.n, 0, 0);
      }
    }
#pragma unroll
    for (int j = 0; j < C::kBoxesB; ++j) {
      if (!brings<C>(j)) continue;
      const int box = at.b / kBox + j;
      Position position;
      int channel_box;
      position.r = divide(p.by_s, divide(p.by_channel_boxes, min(box, p.boxes_b - 1), channel_box), position.s);
      const int c = box < p.boxes_b ? channel_box * kBox : p.channels;
      load_image<kAllBlocks<C>>(p, stage + C::kBytesA + j * kBoxBytes, barrier, c, pixel, start, position);
    }
    pixel += kBox;
  }

 private:
  const BoxParams& p;
  const Place& at;
  int pixel;
};

}  // namespace fastconv::cuda::inline sm90a
