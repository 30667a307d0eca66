// Which kernel of local_response_norm.cuh runs, and in what grid.
#include <algorithm>

#include "cuda/kernels/local_response_norm_planes.cuh"
#include "cuda/kernels/local_response_norm_rows.cuh"
#include "cuda/kernels/local_response_norm_wide.cuh"

namespace fastconv::cuda {
namespace {

using namespace lrn;

constexpr int kSharedLimit = 48 * 1024;

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
