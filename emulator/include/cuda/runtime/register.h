// The twin of csrc/cuda/runtime/register.h: the same glue, on the CPU key of a library of its own.
#pragma once

#include "common/stable.h"

#define FASTCONV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastconv_emulated, CPU, m)
