// The kernels of depthwise convolutions, for all types.
#include "cuda/depthwise_conv2d/plan.h"
#include "cuda/depthwise_conv2d/sm80/kernel.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise;

template <class T, int kWidth, int kFilter, int kStride>
struct Fprop {
  static constexpr auto kKernel = &fprop<T, kWidth, kFilter, kStride>;
};
template <class T, int kWidth, int kFilter, int kStride>
struct Dgrad {
  static constexpr auto kKernel = &dgrad<T, kWidth, kFilter, kStride>;
};
template <class T, int kWidth, int kFilter, int kStride>
struct Wgrad {
  static constexpr auto kKernel = &wgrad<T, kWidth, kFilter, kStride>;
};

template <template <class, int, int, int> class Kernel, bool kVectors, int kFilter>
void run(const KernelInfo& info, const LaunchShape& shape, const LaunchShape& sums, const DepthwiseConv2dParams& p,
         Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kWidth = kVectors ? kLane<T> : 1;
    auto kernel = Kernel<T, kWidth, kFilter, 1>::kKernel;
    if constexpr (kFilter > 0) {
      if (p.stride_width == 2) kernel = Kernel<T, kWidth, kFilter, 2>::kKernel;
    }
    launch(info, kernel, shape, stream, p);
    if (p.workspace) launch(info, &wgrad_sum<T>, sums, stream, p);
  });
}

constexpr Instructions uses_of(Pass pass) {
  return uses::kConvert | uses::kLoadStore | (pass == Pass::kFprop ? uses::kActivate : uses::kPassesGradient);
}

template <template <class, int, int, int> class Kernel, bool kVectors, int kFilter>
DepthwiseVariant variant(Pass pass, const char* what, double rate, const char* needs) {
  const char* const op = DepthwiseVariant::kOps[static_cast<int>(pass)];
  return {{std::string(op) + "_" + what, op, kArch, {0, 0, 0}, 0, kDepthwiseThreads, -1, needs, uses_of(pass)},
          pass,
          kVectors,
          kFilter,
          rate,
          &run<Kernel, kVectors, kFilter>};
}

constexpr const char* kVectorNeeds =
    "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one filter for each";
constexpr const char* kFilterNeeds = "a filter of this width without dilation, stride 1 or 2 along the row";
constexpr const char* kBothNeed =
    "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one filter for each, a filter of this "
    "width without dilation, stride 1 or 2 along the row";

// Rates: farther apart than the grids of two kernels can be (5 times as many blocks for any filter in wgrad, 4 times as
// many lanes without vectors), so that the first that can run is taken, however little of the device it fills.
template <template <class, int, int, int> class Kernel>
Register<DepthwiseVariant> kernels_of(Pass pass) {
  return {
      static_cast<int>(pass),
      {variant<Kernel, true, 3>(pass, "nhwc_3x", 1, kBothNeed), variant<Kernel, true, 5>(pass, "nhwc_5x", 1, kBothNeed),
       variant<Kernel, true, 0>(pass, "nhwc", 0.1, kVectorNeeds),
       variant<Kernel, false, 3>(pass, "any_3x", 0.02, kFilterNeeds),
       variant<Kernel, false, 5>(pass, "any_5x", 0.02, kFilterNeeds),
       variant<Kernel, false, 0>(pass, "any", 0.002, "")}};
}

const Register<DepthwiseVariant> registered[] = {kernels_of<Fprop>(Pass::kFprop), kernels_of<Dgrad>(Pass::kDgrad),
                                                 kernels_of<Wgrad>(Pass::kWgrad)};

}  // namespace
}  // namespace fastconv::cuda
