// The fused kernels of depthwise-separable convolutions, for 16-bit types and TF32.
#include "cuda/depthwise_separable_conv2d/plan.h"
#include "cuda/depthwise_separable_conv2d/sm80/kernel.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise_separable;

template <class T, int kPixels, int kFilter>
void run_type(const KernelInfo& info, const LaunchShape& shape, const DepthwiseSeparableConv2dParams& p,
              Stream stream) {
  auto kernel = &fprop_nhwc<T, kPixels, kFilter, 1>;
  if constexpr (kFilter > 0) {
    if (p.depthwise.stride_width == 2) kernel = &fprop_nhwc<T, kPixels, kFilter, 2>;
  }
  launch(info, kernel, shape, stream, p);
}

template <bool kTf32, int kPixels, int kFilter>
void run(const KernelInfo& info, const LaunchShape& shape, const DepthwiseSeparableConv2dParams& p, Stream stream) {
  if constexpr (kTf32) {
    run_type<float, kPixels, kFilter>(info, shape, p, stream);
  } else if (p.depthwise.dtype == DType::kFloat16) {
    run_type<Half, kPixels, kFilter>(info, shape, p, stream);
  } else {
    run_type<BFloat16, kPixels, kFilter>(info, shape, p, stream);
  }
}

constexpr const char* kNeeds = "fp16 or bf16, channels a multiple of 8 and side by side, one filter for each";
constexpr const char* kFilterNeeds =
    "fp16 or bf16, channels a multiple of 8 and side by side, one filter 3 wide for each, no dilation, stride 1 or 2";
constexpr const char* kTf32Needs = "float32 in TF32, channels a multiple of 4 and side by side, one filter for each";
constexpr const char* kTf32FilterNeeds =
    "float32 in TF32, channels a multiple of 4 and side by side, one filter 3 wide for each, no dilation, stride 1 or "
    "2";

template <bool kTf32>
constexpr Instructions uses_of =
    uses::kSmemAddress | uses::kCpAsync | uses::kLdmatrix | uses::kActivate | uses::kLoadStore |
    (kTf32 ? uses::kToTf32 | uses::kMmaTf32 : uses::kConvert | uses::kMmaHalf | uses::kMmaBFloat16 | uses::kShuffle);

template <bool kTf32, int kPixels, int kFilter>
SeparableVariant variant(const char* what, double rate) {
  constexpr const char* kOp = SeparableVariant::kOps[0];
  constexpr int kDepthOf = kTf32 ? kDepth<float> : kDepth<Half>;
  const char* needs = kTf32 ? (kFilter > 0 ? kTf32FilterNeeds : kTf32Needs) : (kFilter > 0 ? kFilterNeeds : kNeeds);
  return {{std::string(kOp) + "_nhwc_" + what,
           kOp,
           kArch,
           {kPixels, kColumns, kDepthOf},
           kStages,
           kThreads,
           -1,
           needs,
           uses_of<kTf32>},
          kTf32,
          kPixels,
          kFilter,
          rate,
          &run<kTf32, kPixels, kFilter>};
}

// Rates: 128 pixels read the pointwise weight half as often as 64, which counts where `objection` in plan.cpp leaves
// both: up to 128 channels, on a device that blocks of 128 pixels fill. There the larger block is meant to win.
const Register<SeparableVariant> registered(0, {variant<false, 128, 3>("128_3x", 1), variant<false, 128, 0>("128", 0.5),
                                                variant<false, 64, 3>("64_3x", 0.5), variant<false, 64, 0>("64", 0.2),
                                                variant<true, 128, 3>("tf32_128_3x", 1),
                                                variant<true, 128, 0>("tf32_128", 0.5),
                                                variant<true, 64, 3>("tf32_64_3x", 0.5),
                                                variant<true, 64, 0>("tf32_64", 0.2)});

}  // namespace
}  // namespace fastconv::cuda
