// The kernels of a pass and a dtype. Each conv2d_<pass>_<dtype>.cu instantiates one list, so that they compile side by
// side.
#pragma once

#include "cuda/kernels/conv2d.cuh"

#define FASTCONV_CONV_NAME(pass, variant) "conv2d_" pass "_" variant "_sm80"

namespace fastconv::cuda {

constexpr const char* kGatherNeeds = "";
constexpr const char* kVectorNeeds = "channels_last, channels of a group in multiples of 16 bytes";
constexpr const char* kUnmaskedNeeds = "channels_last, channels of a group in multiples of 16 bytes, no activation";

template <Pass kPass, class T, class Math, DType kDType, bool kTf32>
void add_conv_variants(std::vector<ConvVariant>& list, const char* const (&names)[5]) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr bool kBackward = kPass != Pass::kFprop;
  // Two tile sizes for the tensor cores' 16-bit types; float32 has one, whose accumulators leave room for loads.
  using Large = ConvConfig<T, Math, 128, 128, 2, 4, 3, kVector>;
  using Small = ConvConfig<T, Math, 64, 64, 2, 2, 4, kVector>;
  using Gather = ConvConfig<T, Math, 64, 64, 2, 2, 3, 1>;
  constexpr const char* kFreeNeeds = kBackward ? kUnmaskedNeeds : kVectorNeeds;
  if constexpr (sizeof(T) == 2) {
    list.push_back(conv_variant<kPass, Large, false>(names[0], kDType, kTf32, kFreeNeeds));
    if constexpr (kBackward) {
      list.push_back(conv_variant<kPass, Large, true>(names[1], kDType, kTf32, kVectorNeeds));
    }
  }
  list.push_back(conv_variant<kPass, Small, false>(names[2], kDType, kTf32, kFreeNeeds));
  if constexpr (kBackward) list.push_back(conv_variant<kPass, Small, true>(names[3], kDType, kTf32, kVectorNeeds));
  list.push_back(conv_variant<kPass, Gather, kBackward>(names[4], kDType, kTf32, kGatherNeeds));
}

}  // namespace fastconv::cuda

#define FASTCONV_CONV_NAMES(pass, dtype)                                                          \
  {FASTCONV_CONV_NAME(pass, dtype "_128x128"), FASTCONV_CONV_NAME(pass, dtype "_128x128_masked"), \
   FASTCONV_CONV_NAME(pass, dtype "_64x64"), FASTCONV_CONV_NAME(pass, dtype "_64x64_masked"),     \
   FASTCONV_CONV_NAME(pass, dtype "_gather")}

#define FASTCONV_CONV_REDUCE(kPass, kDType, T)                                                                 \
  template <>                                                                                                  \
  void run_reduce<kPass, kDType>(const KernelInfo& info, const ConvParams& params, dim3 grid, Stream stream) { \
    launch(info, &conv2d_reduce_kernel<kPass, T>, grid, dim3(kReduceThreads), 0, stream, params);              \
  }

// 16-bit types
#define FASTCONV_CONV_HALF(kPass, pass, kDType, dtype, T)                                               \
  namespace fastconv::cuda {                                                                            \
  template <>                                                                                           \
  const std::vector<ConvVariant>& conv_variants<kPass, kDType>() {                                      \
    static const std::vector<ConvVariant> list = [] {                                                   \
      std::vector<ConvVariant> found;                                                                   \
      add_conv_variants<kPass, T, HalfMath<T>, kDType, false>(found, FASTCONV_CONV_NAMES(pass, dtype)); \
      return found;                                                                                     \
    }();                                                                                                \
    return list;                                                                                        \
  }                                                                                                     \
  FASTCONV_CONV_REDUCE(kPass, kDType, T)                                                                \
  }

// float32: with TF32 and without
#define FASTCONV_CONV_FLOAT(kPass, pass)                                                                            \
  namespace fastconv::cuda {                                                                                        \
  template <>                                                                                                       \
  const std::vector<ConvVariant>& conv_variants<kPass, DType::kFloat32>() {                                         \
    static const std::vector<ConvVariant> list = [] {                                                               \
      std::vector<ConvVariant> found;                                                                               \
      add_conv_variants<kPass, float, Tf32Math, DType::kFloat32, true>(found, FASTCONV_CONV_NAMES(pass, "tf32"));   \
      add_conv_variants<kPass, float, FloatMath, DType::kFloat32, false>(found, FASTCONV_CONV_NAMES(pass, "fp32")); \
      return found;                                                                                                 \
    }();                                                                                                            \
    return list;                                                                                                    \
  }                                                                                                                 \
  FASTCONV_CONV_REDUCE(kPass, DType::kFloat32, float)                                                               \
  }
