// The kernels of depthwise convolutions, for all types.
#include "cuda/depthwise_conv2d/plan.h"
#include "cuda/depthwise_conv2d/sm80/strips.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise;

template <Pass kPass, class T, int kWidth>
constexpr auto any_filter() {
  if constexpr (kPass == Pass::kFprop) return &fprop<T, kWidth>;
  if constexpr (kPass == Pass::kDgrad) return &dgrad<T, kWidth>;
  if constexpr (kPass == Pass::kWgrad) return &wgrad<T, kWidth>;
}

template <Pass kPass, class T, Vectors kVectors, int kFilter, int kStride>
constexpr auto strips() {
  constexpr Strip kStrip = strip_of(kPass, sizeof(T), kVectors, kFilter);
  if constexpr (kPass == Pass::kFprop)
    return &fprop_strips<T, kVectors, kStrip.channels, kStrip.columns, kFilter, kStride>;
  if constexpr (kPass == Pass::kDgrad)
    return &dgrad_strips<T, kVectors, kStrip.channels, kStrip.columns, kFilter, kStride>;
  if constexpr (kPass == Pass::kWgrad)
    return &wgrad_strips<T, kVectors, kStrip.channels, kStrip.columns, kFilter, kStride>;
}

template <Pass kPass, Vectors kVectors, int kFilter>
void run(const KernelInfo& info, const LaunchShape& shape, const LaunchShape& sums, const DepthwiseConv2dParams& p,
         Stream stream) {
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    if constexpr (kFilter > 0) {
      const bool two = p.stride_width == 2;
      launch(info, two ? strips<kPass, T, kVectors, kFilter, 2>() : strips<kPass, T, kVectors, kFilter, 1>(), shape,
             stream, p);
    } else {
      launch(info, any_filter<kPass, T, kVectors == Vectors::kChannels ? kLane<T> : 1>(), shape, stream, p);
    }
    if (p.workspace) launch(info, &wgrad_sum<T>, sums, stream, p);
  });
}

constexpr Instructions uses_of(Pass pass) {
  return uses::kConvert | uses::kLoadStore | (pass == Pass::kFprop ? uses::kActivate : uses::kPassesGradient);
}

template <Pass kPass, Vectors kVectors, int kFilter>
DepthwiseVariant variant(const char* what, double rate, const char* needs) {
  const char* const op = DepthwiseVariant::kOps[static_cast<int>(kPass)];
  const bool is_strips = kFilter > 0 && kPass != Pass::kWgrad;  // wgrad_sum has as many threads as the others
  const int threads = is_strips ? kStripThreads : kDepthwiseThreads;
  return {{std::string(op) + "_" + what, op, kArch, {0, 0, 0}, 0, threads, -1, needs, uses_of(kPass)},
          kPass,
          kVectors,
          kFilter,
          rate,
          &run<kPass, kVectors, kFilter>};
}

constexpr const char* kVectorNeeds =
    "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one filter for each";
constexpr const char* kFilterNeeds =
    "a filter of this size without dilation, both strides 1 or both 2, for dgrad one filter for each channel";
constexpr const char* kBothNeed =
    "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one filter for each, of this size "
    "without dilation, both strides 1 or both 2";
constexpr const char* kRowsNeed =
    "columns side by side in rows of whole vectors of 4 (float64: 2), aligned to these, a filter of this size without "
    "dilation, padded by half of its width, both strides 1 or both 2, for dgrad one filter for each channel";

// Rates: farther apart than the grids of two kernels can be (as many times as many blocks for any filter in wgrad as it
// has taps, 4 times as many lanes without vectors), so that the first that can run is taken, however little of the
// device it fills.
template <Pass kPass>
Register<DepthwiseVariant> kernels_of() {
  using enum Vectors;
  return {
      static_cast<int>(kPass),
      {variant<kPass, kChannels, 3>("nhwc_3x3", 1, kBothNeed), variant<kPass, kChannels, 5>("nhwc_5x5", 1, kBothNeed),
       variant<kPass, kPixels, 3>("nchw_3x3", 1, kRowsNeed), variant<kPass, kPixels, 5>("nchw_5x5", 1, kRowsNeed),
       variant<kPass, kChannels, 0>("nhwc", 0.03, kVectorNeeds),
       variant<kPass, kNone, 3>("any_3x3", 0.02, kFilterNeeds), variant<kPass, kNone, 5>("any_5x5", 0.02, kFilterNeeds),
       variant<kPass, kNone, 0>("any", 0.0005, "")}};
}

const Register<DepthwiseVariant> registered[] = {kernels_of<Pass::kFprop>(), kernels_of<Pass::kDgrad>(),
                                                 kernels_of<Pass::kWgrad>()};

}  // namespace
}  // namespace fastconv::cuda
