// The kernels of local response normalisation, for all types.
#include "cuda/local_response_norm/plan.h"
#include "cuda/local_response_norm/sm80/lanes.cuh"
#include "cuda/local_response_norm/sm80/planes.cuh"
#include "cuda/local_response_norm/sm80/rows.cuh"
#include "cuda/local_response_norm/sm80/wide.cuh"

namespace fastconv::cuda {
namespace {

using namespace lrn;

template <bool kBackward>
void run_lanes(const KernelInfo& info, const LaunchShape& shape, const LocalResponseNormParams& p, Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    if constexpr (sizeof(T) <= 4) {
      const bool activated = p.activation != Activation::kNone;
      if constexpr (kBackward) {
        launch(info, activated ? &dgrad_lanes<T, true> : &dgrad_lanes<T, false>, shape, stream, p);
      } else {
        launch(info, activated ? &fprop_lanes<T, true> : &fprop_lanes<T, false>, shape, stream, p);
      }
    }
  });
}

template <bool kBackward, int kWidth, int kSize, class T>
constexpr auto rows_kernel() {
  if constexpr (kBackward) {
    return &dgrad_rows<T, kWidth, kSize>;
  } else {
    return &fprop_rows<T, kWidth, kSize>;
  }
}

template <bool kBackward, bool kVectors>
void run_rows(const KernelInfo& info, const LaunchShape& shape, const LocalResponseNormParams& p, Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    auto kernel = rows_kernel<kBackward, kVectors ? kVector<T> : 1, 0, T>();
    if constexpr (!kVectors) {
      if (has_known_window(p)) kernel = rows_kernel<kBackward, 1, kWindow, T>();
    }
    launch(info, kernel, shape, stream, p);
  });
}

template <bool kBackward, int kWidth, bool kActivated, class T>
constexpr auto planes_kernel() {
  if constexpr (kBackward) {
    return &dgrad_planes<T, lrn_planes_width(true, kWidth), kActivated>;
  } else {
    return &fprop_planes<T, kWidth, kActivated>;
  }
}

template <bool kBackward, bool kVectors>
void run_planes(const KernelInfo& info, const LaunchShape& shape, const LocalResponseNormParams& p, Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    auto kernel = planes_kernel<kBackward, kVectors ? kVector<T> : 1, true, T>();
    if constexpr (kVectors) {
      if (p.activation == Activation::kNone) kernel = planes_kernel<kBackward, kVector<T>, false, T>();
    }
    launch(info, kernel, shape, stream, p);
  });
}

template <bool kBackward>
void run_wide(const KernelInfo& info, const LaunchShape& shape, const LocalResponseNormParams& p, Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    if constexpr (kBackward) {
      launch(info, &dgrad_wide_terms<T>, shape, stream, p);
      launch(info, &dgrad_wide_sums<T>, shape, stream, p);
    } else {
      launch(info, &fprop_wide<T>, shape, stream, p);
    }
  });
}

LrnVariant variant(bool backward, LrnWalk walk, bool vectors, const char* what, double rate, LrnVariant::Run run,
                   const char* needs) {
  const char* const op = LrnVariant::kOps[backward];
  const Instructions uses = uses::kConvert | uses::kActivate | uses::kRsqrt | uses::kSqrt | uses::kLog2 | uses::kExp2 |
                            uses::kPower | (backward ? uses::kPassesGradient : uses::kNothing) |
                            (walk == LrnWalk::kWide ? uses::kNothing : uses::kLoadStore) |
                            (walk == LrnWalk::kLanes ? uses::kShuffle : uses::kNothing);
  const int shared_bytes = walk == LrnWalk::kRows ? -1 : 0;
  return {{std::string(op) + "_" + what, op, kArch, {0, 0, 0}, 0, kThreads, shared_bytes, needs, uses},
          backward,
          walk,
          vectors ? 16 : 0,
          rate,
          run};
}

constexpr const char* kLanes =
    "size 5, channels side by side, whole vectors of 16 bytes of them, 16-byte aligned, no float64";
constexpr const char* kRowsVector = "channels side by side, whole vectors of 16 bytes of them, 16-byte aligned";
constexpr const char* kRows = "channels side by side, a size whose halo fits into shared memory";
constexpr const char* kPlanesVector = "size 5, whole vectors of 16 bytes of pixels, 16-byte aligned";
constexpr const char* kWideBackward = "a workspace of the tensor's size in float32 (float64)";

// Rates: farther apart than the grids of two kernels can be (16 times as many blocks without vectors), so that vectors
// are taken wherever they can be, however little of the device they fill.
template <bool kBackward>
Register<LrnVariant> kernels() {
  return {kBackward,
          {variant(kBackward, LrnWalk::kLanes, true, "nhwc_lanes", 1, &run_lanes<kBackward>, kLanes),
           variant(kBackward, LrnWalk::kRows, true, "nhwc_vec", 0.3, &run_rows<kBackward, true>, kRowsVector),
           variant(kBackward, LrnWalk::kRows, false, "nhwc", 0.015, &run_rows<kBackward, false>, kRows),
           variant(kBackward, LrnWalk::kPlanes, true, "nchw_vec", 1, &run_planes<kBackward, true>, kPlanesVector),
           variant(kBackward, LrnWalk::kPlanes, false, "nchw", 0.02, &run_planes<kBackward, false>, "size 5"),
           variant(kBackward, LrnWalk::kWide, false, "wide", 0.0005, &run_wide<kBackward>,
                   kBackward ? kWideBackward : "")}};
}

const Register<LrnVariant> registered[] = {kernels<false>(), kernels<true>()};

}  // namespace
}  // namespace fastconv::cuda
