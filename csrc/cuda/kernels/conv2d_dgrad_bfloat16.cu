#include "cuda/kernels/conv2d_variants.cuh"
FASTCONV_CONV_HALF(Pass::kDgrad, "dgrad", DType::kBFloat16, "bf16", BFloat16)
