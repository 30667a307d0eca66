// Where the glue registers its operators; emulator/ has a twin that registers them elsewhere.
#pragma once

#include "common/stable.h"

#define FASTCONV_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastconv, CUDA, m)
