#include "cpu/kernels/depthwise_conv2d.h"

#include "cpu/kernels/depthwise_nhwc.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {

void depthwise_conv2d_fprop_nhwc(const DepthwiseConv2dParams& params, int64_t begin, int64_t end) {
  for_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    depthwise_pixels<T>(params, begin, end, static_cast<T*>(params.output) + begin * params.channels);
  });
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
