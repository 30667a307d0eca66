// The elementwise kernels, for all operations and types.
#include "cuda/elementwise/plan.h"
#include "cuda/elementwise/sm80/kernel.cuh"

namespace fastconv::cuda {
namespace {

template <Elementwise kOperation, bool kVectors>
void run_flat(const KernelInfo& info, const LaunchShape& shape, const ElementwiseParams& params, Stream stream) {
  for_element_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    launch(info, &elementwise_flat < kOperation, T, kVectors ? kVector<T> : 1 >, shape, stream, params);
  });
}

template <Elementwise kOperation>
void run_strided(const KernelInfo& info, const LaunchShape& shape, const ElementwiseParams& params, Stream stream) {
  for_element_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const bool small = params.numel <= INT32_MAX;
    launch(info, small ? &elementwise_strided<kOperation, T, uint32_t> : &elementwise_strided<kOperation, T, uint64_t>,
           shape, stream, params);
  });
}

ElementwiseVariant variant(Elementwise operation, ElementwiseAccess access, const char* what, double rate,
                           ElementwiseVariant::Run run, const char* needs) {
  const char* const op = ElementwiseVariant::kOps[static_cast<int>(operation)];
  const Instructions uses = uses::kConvert |
                            (operation == Elementwise::kMask ? uses::kPassesGradient : uses::kActivate) |
                            (access == ElementwiseAccess::kStrided ? uses::kNothing : uses::kLoadStore);
  return {
      {std::string(op) + "_" + what, op, kArch, {0, 0, 0}, 0, kElementwiseThreads, 0, needs, uses}, access, rate, run};
}

template <Elementwise kOperation>
Register<ElementwiseVariant> flat_kernels() {
  return {static_cast<int>(kOperation),
          {variant(kOperation, ElementwiseAccess::kVectors, "vec16", 1, &run_flat<kOperation, true>,
                   "tensors of one dense layout, 16-byte aligned"),
           variant(kOperation, ElementwiseAccess::kElements, "vec1", 0.05, &run_flat<kOperation, false>,
                   "tensors of one dense layout")}};
}

template <Elementwise kOperation>
Register<ElementwiseVariant> strided_kernel() {
  return {static_cast<int>(kOperation),
          {variant(kOperation, ElementwiseAccess::kStrided, "strided", 0.05, &run_strided<kOperation>,
                   "an output that is dense in some order of at most 6 dimensions")}};
}

const Register<ElementwiseVariant> registered[] = {
    flat_kernels<Elementwise::kAdd>(),  strided_kernel<Elementwise::kAdd>(),  flat_kernels<Elementwise::kActivate>(),
    flat_kernels<Elementwise::kMask>(), strided_kernel<Elementwise::kMask>(),
};

}  // namespace
}  // namespace fastconv::cuda
