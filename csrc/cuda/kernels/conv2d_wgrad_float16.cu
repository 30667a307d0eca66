#include "cuda/kernels/conv2d_variants.cuh"
FASTCONV_CONV_HALF(Pass::kWgrad, "wgrad", DType::kFloat16, "fp16", Half)
