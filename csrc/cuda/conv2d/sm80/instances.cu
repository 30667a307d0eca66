// The kernels of one pass and one dtype. The build compiles this file for each of them, see _build/sources.py:
// FASTCONV_PASS is kFprop, kDgrad or kWgrad, FASTCONV_DTYPE is kFloat16, kBFloat16 or kFloat32.
#include "cuda/conv2d/plan.h"
#include "cuda/conv2d/sm80/kernel.cuh"

namespace fastconv::cuda {
namespace {

constexpr Pass kPass = Pass::FASTCONV_PASS;
constexpr DType kDType = DType::FASTCONV_DTYPE;
constexpr bool kBackward = kPass != Pass::kFprop;
constexpr int kFamily = static_cast<int>(kPass);

using T =
    std::conditional_t<kDType == DType::kFloat32, float, std::conditional_t<kDType == DType::kFloat16, Half, BFloat16>>;
constexpr const char* kType = kDType == DType::kFloat32 ? "fp32" : kDType == DType::kFloat16 ? "fp16" : "bf16";

constexpr int kVectorOfT = 16 / sizeof(T);
template <class Math>
using Large = ConvConfig<T, Math, 128, 128, 2, 4, 3, kVectorOfT>;
template <class Math>
using Small = ConvConfig<T, Math, 64, 64, 2, 2, 4, kVectorOfT>;
template <class Math>
using Gather = ConvConfig<T, Math, 64, 64, 2, 2, 3, 1>;

std::string name_of(const char* type, const char* what) {
  return std::string(ConvVariant::kOps[kFamily]) + "_" + type + "_" + what + "_sm" + std::to_string(kArch.number);
}

void reduce(const KernelInfo& info, const LaunchShape& shape, const ConvParams& params, Stream stream) {
  launch(info, &conv2d_reduce_kernel<kPass, T>, shape, stream, params);
}

// Of what finishes a sum
constexpr Instructions kEpilogueUses =
    (kBackward ? uses::kNothing : uses::kActivate) | (kDType == DType::kFloat32   ? uses::kNothing
                                                      : kDType == DType::kFloat16 ? uses::kConvertHalf
                                                                                  : uses::kConvertBFloat16);

const ListedKernel reduction({name_of(kType, "reduce"),
                              "conv2d_reduce",
                              kArch,
                              {0, 0, 0},
                              0,
                              kReduceThreads,
                              0,
                              "a split depth",
                              kEpilogueUses});

template <class C, bool kMasked>
ConvVariant variant(const char* type, const char* what, double rate) {
  const char* needs = C::kVector == 1 ? ""
                      : kBackward && !kMasked
                          ? "channels_last, channels of a group in multiples of 16 bytes, no activation"
                          : "channels_last, channels of a group in multiples of 16 bytes";
  return {{name_of(type, what),
           ConvVariant::kOps[kFamily],
           kArch,
           {C::kTileA, C::kTileB, C::kTileDepth},
           C::kStages,
           C::kThreads,
           C::kSharedBytes,
           needs,
           kEpilogueUses | uses::kLoadStore | C::Math::kUses | (kMasked ? uses::kPassesGradient : uses::kNothing) |
               (conv2d_copies<C> ? uses::kSmemAddress | uses::kCpAsync : uses::kNothing)},
          kPass,
          kDType,
          std::is_same_v<typename C::Math, Tf32Math>,
          kMasked,
          C::kVector,
          rate,
          [](const KernelInfo& info, const LaunchShape& shape, const ConvParams& params, Stream stream) {
            launch(info, &conv2d_kernel<kPass, C, kMasked>, shape, stream, params);
          },
          &reduction.info,
          &reduce};
}

// Rates: 128x128 tiles do twice the arithmetic of 64x64 for a byte of shared memory; a mask is another tensor to read;
// to gather costs an address for every element.
template <class Math>
void register_kernels(const char* type) {
  if constexpr (sizeof(T) == 2) {
    Register<ConvVariant>(kFamily, {variant<Large<Math>, false>(type, "128x128", 1)});
    if constexpr (kBackward) {
      Register<ConvVariant>(kFamily, {variant<Large<Math>, true>(type, "128x128_masked", 0.8)});
    }
  }
  // float32 has one size of tiles, whose accumulators leave room for loads.
  Register<ConvVariant>(kFamily, {variant<Small<Math>, false>(type, "64x64", 0.7)});
  if constexpr (kBackward) Register<ConvVariant>(kFamily, {variant<Small<Math>, true>(type, "64x64_masked", 0.56)});
  Register<ConvVariant>(kFamily, {variant<Gather<Math>, kBackward>(type, "gather", 0.1)});
}

const bool registered = [] {
  if constexpr (sizeof(T) == 2) {
    register_kernels<HalfMath<T>>(kType);
  } else {
    register_kernels<Tf32Math>("tf32");
    register_kernels<FloatMath>("fp32");
  }
  return true;
}();

}  // namespace
}  // namespace fastconv::cuda
