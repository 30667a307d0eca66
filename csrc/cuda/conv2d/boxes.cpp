#include "cuda/conv2d/boxes.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <tuple>

namespace fastconv::cuda {
namespace {

int boxes_of(int64_t elements) { return static_cast<int>(ceil_div(elements, kBox)); }

// Elements between neighbouring pixels where all images' lie at one distance; nothing where they do not.
std::optional<int64_t> pixel_pitch(const Strides& strides, int64_t n, int64_t h, int64_t w, int64_t channels) {
  int64_t pitch = 0, pixels = 1;
  for (const auto& [size, stride] : {std::pair{w, strides.w}, {h, strides.h}, {n, strides.n}}) {
    if (size == 1) continue;
    if (pitch == 0) pitch = stride;
    if (stride == 0 || stride != pitch * pixels) return std::nullopt;
    pixels *= size;
  }
  return pitch ? pitch : ceil_div(channels, 8) * 8;
}

constexpr const char* kNoWalk = "the distances of images, rows and columns are no multiples of each other";

// What is walked over: the input, or in dgrad the gradient of the output
struct Image {
  const void* data;
  int n, h, w, c;
  Strides strides;
};

Image image_of(Pass pass, const ConvParams& p) {
  const ConvArguments& arg = p.arg;
  if (pass == Pass::kDgrad) return {arg.grad_output, arg.n, arg.p, arg.q, arg.grad_channels, arg.y};
  return {arg.input, arg.n, arg.h, arg.w, arg.c, arg.x};
}
Image residual_of(const ConvParams& p) {
  const ConvBranch& branch = p.arg.branch[0];
  return {branch.residual, p.arg.n, p.arg.p, p.arg.q, branch.k, branch.y};
}
Image gradient_of(const ConvParams& p) {
  return {p.arg.grad_output, p.arg.n, p.arg.p, p.arg.q, p.arg.grad_channels, p.arg.y};
}

// One axis of the walk: pixels at first + index * step meet the position with the least offset.
struct Axis {
  int first, step, count, extent;
  int offset, tap;  // of the first position from there, and from one position to the next
  int reach;        // the largest offset
};
Axis axis(int first, int step, int tap, const Phase& phase, int extent) {
  const int reach = (std::max(phase.positions, 1) - 1) * tap;
  return {first + std::min(reach, 0), step, phase.pixels, extent, std::max(-reach, 0), tap, std::abs(reach)};
}
Axis axis_h(const ConvParams& p) { return axis(p.walk.first_h, p.walk.step_h, p.walk.tap_h, p.rows, p.walk.height); }
Axis axis_w(const ConvParams& p) { return axis(p.walk.first_w, p.walk.step_w, p.walk.tap_w, p.columns, p.walk.width); }

// Of all pixels that the positions meet from those, one after the other
Axis with_halo(const Axis& of) { return {of.first, of.step, of.count + of.reach, of.extent, of.offset, of.tap, 0}; }

// Boxes of pixels that a tile meets, or in wgrad a box of the gradient
int patch_of(Pass pass, int64_t reach) {
  return static_cast<int>(ceil_div((pass == Pass::kWgrad ? kBox : kHaloTile) + reach, kBox));
}

int64_t halo_pixels(const ConvParams& p) {
  return int64_t{p.arg.n} * with_halo(axis_h(p)).count * with_halo(axis_w(p)).count;
}

bool is_whole(const Axis& axis) { return axis.first == 0 && axis.step == 1 && axis.count == axis.extent; }

// Whether a position's pixels are all pixels of the image, in their order, at one pitch
bool is_plain(Pass pass, const ConvParams& p) {
  const Image image = image_of(pass, p);
  return p.rows.positions * p.columns.positions == 1 && is_whole(axis_h(p)) && is_whole(axis_w(p)) &&
         pixel_pitch(image.strides, image.n, image.h, image.w, image.c);
}

// `slack`: by how much another phase of a stride may lie elsewhere
bool fits_im2col(const Axis& axis, int slack) {
  const int64_t lower = axis.first, upper = lower + int64_t{axis.count - 1} * axis.step - (axis.extent - 1);
  return axis.step <= kMostStep && std::min(lower, upper) - slack >= -kMostCorner &&
         std::max(lower, upper) + slack <= kMostCorner && axis.reach <= kMostOffset;
}

// The driver wants each stride as a multiple of the one before.
bool has_nested_strides(const Image& image) {
  int64_t inner = 1;
  for (const auto& [size, stride] : {std::pair<int64_t, int64_t>{image.w, image.strides.w},
                                     {image.h, image.strides.h},
                                     {image.n, image.strides.n}}) {
    if (size == 1) continue;
    if (stride == 0 || stride % inner) return false;
    inner = stride;
  }
  return true;
}

Im2colMap walk_of(DType dtype, const Image& image, const Axis& h, const Axis& w, int pixels) {
  // The strides of a single element say nothing; the driver wants them in order.
  const auto& s = image.strides;
  const int64_t of_images = image.n > 1 ? s.n : 0, of_rows = image.h > 1 ? s.h : of_images;
  const int64_t stride_w = image.w > 1 ? s.w : of_rows ? of_rows : ceil_div(image.c, 8) * 8;
  const int64_t stride_h = of_rows ? of_rows : stride_w * image.w;
  const int64_t stride_n = of_images ? of_images : stride_h * image.h;
  return {image.data, dtype,   image.n, image.h, image.w, image.c, stride_n, stride_h,
          stride_w,   h.first, w.first, h.step,  w.step,  h.count, w.count,  pixels};
}

TiledMap matrix(DType dtype, const void* data, int64_t channels, int64_t pixels, int64_t pitch, int box) {
  return {data, dtype, 2, {channels, pixels, 1}, {pitch, 0}, {box, 1}};
}

// [filters, positions, channels], dense
TiledMap filters_map(DType dtype, const void* data, int64_t filters, int64_t positions, int64_t channels) {
  return {data, dtype, 3, {channels, positions, filters}, {channels, positions * channels}, {1, kBox}};
}

TensorMap image_map(DType dtype, const Image& image, bool plain, const Axis& h, const Axis& w, int pixels) {
  if (!plain) return im2col_map(walk_of(dtype, image, h, w, pixels));
  const int64_t pitch = *pixel_pitch(image.strides, image.n, image.h, image.w, image.c);
  return tiled_map(matrix(dtype, image.data, image.c, int64_t{image.n} * image.h * image.w, pitch, pixels));
}

// Where an image of results lies
Strides result_strides(Pass pass, const ConvParams& p, int branch) {
  return pass == Pass::kFprop ? p.arg.branch[branch].y : p.arg.x;
}
std::optional<int64_t> result_pitch(Pass pass, const ConvParams& p, int branch) {
  const ConvArguments& arg = p.arg;
  if (pass == Pass::kFprop) return pixel_pitch(arg.branch[branch].y, arg.n, arg.p, arg.q, arg.branch[branch].k);
  if (p.rows.step_pixel != 1 || p.columns.step_pixel != 1) return std::nullopt;
  return pixel_pitch(arg.x, arg.n, arg.h, arg.w, arg.c);
}

const char* refuses_halo(Pass pass, const ConvParams& p, int slack) {
  const Axis h = axis_h(p), w = axis_w(p);
  if (p.rows.positions * p.columns.positions < 2) return "the filter has one position";
  if (h.step != 1 || w.step != 1) return "it has a stride";
  if (p.arg.branches > 1) return "it has branches";
  // The first corner of a phase of a stride that has no positions
  const int corner =
      static_cast<int>(std::max(ceil_div(p.arg.pad_h, p.arg.stride_h), ceil_div(p.arg.pad_w, p.arg.stride_w)));
  const bool fits = fits_im2col(with_halo(h), slack) && fits_im2col(with_halo(w), slack);
  if (!fits || std::max({h.reach, w.reach, pass == Pass::kDgrad ? corner : 0}) > kMostCorner) {
    return "padding or the filter's reach are too long for a map";
  }
  const int64_t pitch = with_halo(w).count + (p.arg.stride_w > 1);
  int slots = kHaloSlots;
  if (pass == Pass::kWgrad) {
    if (p.arg.r != kHaloSide || p.arg.s != kHaloSide) return "the filter is not 3x3";
    if (w.reach > kBox) return "the filter's columns lie too far apart";
    slots = kHaloWgradSlots - 1;  // one has not been told to be free when the next one is waited for
  }
  if (patch_of(pass, h.reach * pitch + w.reach) > slots) {
    return "the rows of a tile, and those around it, do not fit into shared memory";
  }
  // Another phase of a stride may have one row and column more.
  const int64_t rows = with_halo(h).count + (p.arg.stride_h > 1);
  if (static_cast<double>(p.arg.n) * static_cast<double>(rows * pitch) >
      std::numeric_limits<int>::max() - kSpareExtent) {
    return "it has too many pixels with those around";
  }
  if (!has_nested_strides(image_of(pass, p))) return kNoWalk;
  if (pass == Pass::kFprop && p.arg.branch[0].residual && !has_nested_strides(residual_of(p))) return kNoWalk;
  return nullptr;
}

// What a halo changes in parameters that are else complete; `rows` are those of extent a.
void add_halo(Pass pass, const ConvParams& p, int64_t rows, const BoxTiles& of, int tiles_b, int multiprocessors,
              BoxParams& b) {
  const Axis h = axis_h(p), w = axis_w(p);
  const int pitch = with_halo(w).count, pixels = static_cast<int>(halo_pixels(p));
  const bool has_positions = p.rows.positions * p.columns.positions > 0;
  if (!has_positions) b.channel_boxes = 1;  // of zeros
  const int patch = patch_of(pass, has_positions ? int64_t{h.reach} * pitch + w.reach : 0);
  const int tiles = static_cast<int>(ceil_div(rows, of.a));
  const int run = halo_run(pass, tiles, tiles_b, multiprocessors);
  b.halo = {pixels, pitch, patch, b.channel_boxes == 1, tiles, run, std::max(p.rows.positions, 1)};
  b.work = static_cast<int>(ceil_div(tiles, run)) * tiles_b * p.splits;
  b.by_pixels = Divider(static_cast<uint32_t>(pitch * with_halo(h).count)), b.by_columns = Divider(pitch);
  // The first position is that whose pixels come first, as they do but in dgrad.
  for (auto [tap, offset, position, step, count] :
       {std::tie(b.tap_h, b.offset_h, b.first_position, b.position_row, p.rows.positions),
        std::tie(b.tap_w, b.offset_w, b.first_position, b.position_column, p.columns.positions)}) {
    if (tap >= 0) continue;
    tap = -tap, offset = 0, position += (std::max(count, 1) - 1) * step, step = -step;
  }
}

}  // namespace

BoxExtents box_extents(Pass pass, const ConvParams& p, bool halo) {
  int64_t filters = 0;
  for (int i = 0; i < p.arg.branches; ++i) filters += boxes_of(p.filters[i]);
  const int64_t positions = int64_t{p.rows.positions} * p.columns.positions;
  const int64_t of_pass = pass == Pass::kWgrad ? p.depth : p.extent_a;
  const int64_t pixels = halo ? halo_pixels(p) : of_pass;
  if (pass == Pass::kWgrad) return {filters * kBox, positions * boxes_of(p.c_group), boxes_of(pixels), 1};
  const int channels = pass == Pass::kFprop ? p.c_group : p.k_group, boxes = boxes_of(channels);
  // With a halo the last box is multiplied by 16 channels.
  const auto multiplied = static_cast<double>(ceil_div(channels, 16) * 16) / (int64_t{boxes} * kBox);
  return {pixels, pass == Pass::kFprop ? filters : boxes_of(p.c_group), positions * boxes, halo ? multiplied : 1};
}

int halo_run(Pass pass, int64_t tiles_a, int64_t tiles_b, int multiprocessors) {
  if (pass == Pass::kWgrad) return 1;
  return static_cast<int>(ceil_div(tiles_a, std::max<int64_t>(multiprocessors / std::max<int64_t>(tiles_b, 1), 1)));
}

const char* refuses_boxes(Pass pass, const ConvParams& p, bool halo) {
  if (p.arg.groups > 1) return "it has groups";
  // Another phase of a stride may lie elsewhere.
  const int slack = pass == Pass::kDgrad ? std::max(p.arg.dilation_h, p.arg.dilation_w) + 2 : 0;
  if (halo) {
    if (const char* const refused = refuses_halo(pass, p, slack)) return refused;
  } else if (!is_plain(pass, p)) {
    if (!fits_im2col(axis_h(p), slack) || !fits_im2col(axis_w(p), slack)) {
      return "stride, padding or the filter's reach are more than an im2col map can have";
    }
    if (!has_nested_strides(image_of(pass, p))) return kNoWalk;
  }
  if (pass == Pass::kWgrad && !has_nested_strides(gradient_of(p))) return kNoWalk;
  for (int i = 0; i < p.arg.branches && pass == Pass::kFprop; ++i) {
    const ConvBranch& branch = p.arg.branch[i];
    if (!p.wide[i] || p.filters[i] % 8) return "the filters, or results, are not whole vectors";
    if (!halo && !result_pitch(pass, p, i) && (p.arg.branches > 1 || branch.residual)) {
      return "the results' pixels do not lie at one pitch";
    }
  }
  if (!p.wide[0]) return "the results are not whole vectors";
  return nullptr;
}

BoxParams box_params(Pass pass, const ConvParams& p, const BoxTiles& of, int multiprocessors) {
  const ConvArguments& arg = p.arg;
  const auto [rows, boxes_b, deep, multiplied] = box_extents(pass, p, of.halo);
  const Axis h = of.halo ? with_halo(axis_h(p)) : axis_h(p), w = of.halo ? with_halo(axis_w(p)) : axis_w(p);
  // Of the output; with a halo and what lies between its pixels
  const Axis rows_out{0, 1, h.count, arg.p, 0, 0, 0}, columns_out{0, 1, w.count, arg.q, 0, 0, 0};
  const int positions = arg.r * arg.s;

  BoxParams b{};
  b.plain_image = !of.halo && is_plain(pass, p);
  const int pixels = pass == Pass::kWgrad || of.halo ? kBox : of.a;
  b.image = image_map(arg.dtype, image_of(pass, p), b.plain_image, h, w, pixels);
  if (pass == Pass::kWgrad) {
    b.plain_gradient = !of.halo && pixel_pitch(arg.y, arg.n, arg.p, arg.q, arg.grad_channels);
    b.gradient = image_map(arg.dtype, gradient_of(p), b.plain_gradient, rows_out, columns_out, kBox);
  }
  b.activation = arg.activation;

  b.extent_a = pass == Pass::kWgrad ? p.extent_a : static_cast<int>(rows), b.extent_b = p.extent_b;
  b.boxes_b = static_cast<int>(boxes_b), b.deep = static_cast<int>(std::max<int64_t>(deep, 1));
  const int tiles_b = static_cast<int>(ceil_div(boxes_b * kBox, of.b));
  const int tiles = static_cast<int>(ceil_div(rows, of.a * of.cluster)) * tiles_b;
  b.splits = p.splits, b.split_deep = static_cast<int>(ceil_div(b.deep, p.splits));
  b.work = tiles * p.splits;
  b.by_tiles = Divider(static_cast<uint32_t>(tiles)), b.by_tiles_b = Divider(static_cast<uint32_t>(tiles_b));
  b.channels = pass == Pass::kDgrad ? arg.grad_channels : arg.c;
  b.channel_boxes = boxes_of(b.channels);
  b.first_channel = deep == 0 ? b.channels : 0;
  b.by_channel_boxes = Divider(static_cast<uint32_t>(b.channel_boxes)), b.by_s = p.by_s;
  b.s = std::max(p.columns.positions, 1);

  b.by_pixels = p.walk.by_pixels, b.by_columns = p.walk.by_columns;
  b.first_h = h.first, b.first_w = w.first, b.step_h = h.step, b.step_w = w.step;
  b.offset_h = h.offset, b.offset_w = w.offset, b.tap_h = h.tap, b.tap_w = w.tap;
  b.first_position = p.rows.first_position * arg.s + p.columns.first_position;
  b.position_row = p.rows.step_position * arg.s, b.position_column = p.columns.step_position;
  b.rows = p.rows, b.columns = p.columns;
  if (of.halo) add_halo(pass, p, rows, of, tiles_b, multiprocessors, b);

  b.plain_result = true;
  b.branches = arg.branches;
  for (int i = 0; i < arg.branches; ++i) {
    const ConvBranch& branch = arg.branch[i];
    b.filters[i] = p.filters[i], b.first_filter[i] = p.first_filter[i];
    b.first_box[i + 1] = b.first_box[i] + boxes_of(p.filters[i]);
    b.bias[i] = branch.bias;
    if (pass != Pass::kWgrad) {
      b.weight[i] = tiled_map(filters_map(arg.dtype, branch.weight, branch.k, positions, arg.c));
      void* const output = pass == Pass::kFprop ? branch.output : arg.grad_input;
      const int channels = pass == Pass::kFprop ? branch.k : arg.c;
      const auto pitch = of.halo ? std::nullopt : result_pitch(pass, p, i);
      if (pitch) {
        b.result[i] = tiled_map(matrix(arg.dtype, output, channels, p.extent_a, *pitch, kBox));
      } else {
        b.plain_result = false;
        b.output = output, b.y = result_strides(pass, p, i);
      }
      if (branch.residual && pass == Pass::kFprop) {
        b.has_residual = true;
        b.residual = pitch ? tiled_map(matrix(arg.dtype, branch.residual, channels, p.extent_a, *pitch, kBox))
                           : image_map(arg.dtype, residual_of(p), false, rows_out, columns_out, kBox);
      }
    } else if (of.halo) {
      b.output = branch.grad_weight;
    } else {
      b.result[i] = tiled_map(filters_map(arg.dtype, branch.grad_weight, p.filters[i], positions, arg.c));
    }
  }
  b.pitch_b = p.pitch_b;
  return b;
}

}  // namespace fastconv::cuda
