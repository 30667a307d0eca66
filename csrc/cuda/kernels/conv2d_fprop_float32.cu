#include "cuda/kernels/conv2d_variants.cuh"
FASTCONV_CONV_FLOAT(Pass::kFprop, "fprop")
