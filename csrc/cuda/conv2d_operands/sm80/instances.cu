// The kernels that prepare the operands of conv2d, for all types.
#include "cuda/conv2d_operands/plan.h"
#include "cuda/conv2d_operands/sm80/kernel.cuh"

namespace fastconv::cuda {
namespace {

// f(T{}) for the C++ type of `dtype`; convolutions in float64 are torch's own.
template <class F>
void for_type(DType dtype, F&& f) {
  for_element_type(dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    if constexpr (sizeof(T) < 8) f(element);
  });
}

void run_pack(const KernelInfo& info, const LaunchShape& shape, const PackParams& params, Stream stream) {
  for_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const bool whole = params.packed_c % kVector<T> == 0;
    launch(info, whole ? &operands::pack<T, kVector<T>> : &operands::pack<T, 4>, shape, stream, params);
  });
}

template <bool kVectors>
void run_gradient(const KernelInfo& info, const LaunchShape& shape, const GradientParams& params, Stream stream) {
  for_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    launch(info, &operands::gradient < T, kVectors ? kVector<T> : 1 >, shape, stream, params);
  });
}

void run_bias(const KernelInfo& info, const LaunchShape& shape, const GradientParams& params, Stream stream) {
  for_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    launch(info, &operands::bias<T>, shape, stream, params);
  });
}

const ListedKernel bias_sum(
    {"conv2d_gradient_bias", "conv2d_gradient_sum", kArch, {0, 0, 0}, 0, kBiasX * kBiasY, -1, "", uses::kConvert});

GradientVariant gradient_variant(const char* what, bool vectors, double rate, GradientVariant::Run run,
                                 const char* needs) {
  return {{std::string("conv2d_gradient_") + what,
           "conv2d_gradient",
           kArch,
           {0, 0, 0},
           0,
           kGradientThreads,
           -1,
           needs,
           uses::kConvert | uses::kPassesGradient | uses::kLoadStore},
          vectors,
          rate,
          run,
          &bias_sum.info,
          &run_bias};
}

const Register<PackVariant> pack(
    0,
    {{{"conv2d_pack_any", "conv2d_pack", kArch, {0, 0, 0}, 0, kPackThreads, 0, "", uses::kConvert | uses::kLoadStore},
      &run_pack}});
const Register<GradientVariant> gradients(
    0, {gradient_variant("vec16", true, 1, &run_gradient<true>, "channels_last, channels in multiples of 16 bytes"),
        gradient_variant("vec1", false, 0.2, &run_gradient<false>, "channels_last")});

}  // namespace
}  // namespace fastconv::cuda
