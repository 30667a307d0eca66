// The kernels of one pass and one dtype. The build compiles this file for each of them, see _build/sources.py:
// FASTCONV_PASS is kFprop, kDgrad or kWgrad, FASTCONV_DTYPE is kFloat16, kBFloat16 or kFloat32.
#include "cuda/conv2d/plan.h"
#include "cuda/conv2d/sm80/kernel.cuh"
#include "cuda/conv2d/sm80/stem.cuh"
#include "cuda/conv2d/sm80/stem_wgrad.cuh"

namespace fastconv::cuda {
namespace {

constexpr Pass kPass = Pass::FASTCONV_PASS;
constexpr DType kDType = DType::FASTCONV_DTYPE;
constexpr bool kBackward = kPass != Pass::kFprop;
constexpr int kFamily = static_cast<int>(kPass);

using T =
    std::conditional_t<kDType == DType::kFloat32, float, std::conditional_t<kDType == DType::kFloat16, Half, BFloat16>>;
constexpr const char* kType = kDType == DType::kFloat32 ? "fp32" : kDType == DType::kFloat16 ? "fp16" : "bf16";

// What a thread reads at once: 16 bytes, 8, or one element
constexpr int kWhole = 16 / sizeof(T), kNarrow = 4;
template <class Math, int kTileA, int kTileB, int kWarpsA, int kWarpsB, int kBlocks, int kVector = kWhole>
using Config = ConvConfig<T, Math, kTileA, kTileB, kWarpsA, kWarpsB, kVector == 1 ? 3 : 4, kVector, kBlocks>;

std::string name_of(const char* type, const char* what) {
  return std::string(ConvVariant::kOps[kFamily]) + "_" + type + "_" + what + "_sm" + std::to_string(kArch.number);
}

// Of what finishes a sum
constexpr Instructions kEpilogueUses =
    (kBackward ? uses::kNothing : uses::kActivate) | (kDType == DType::kFloat32   ? uses::kNothing
                                                      : kDType == DType::kFloat16 ? uses::kConvertHalf
                                                                                  : uses::kConvertBFloat16);

const KernelInfo kReduction{
    name_of(kType, "reduce"),        "conv2d_reduce", kArch, {0, 0, 0}, 0, kReduceThreads, -1, "a split depth",
    kEpilogueUses | uses::kLoadStore};

void reduce(const KernelInfo& info, const ConvLaunch& planned, Stream stream) {
  launch(info, &conv2d_reduce_kernel<kPass, T>, planned.reduction, stream, planned.params);
}

template <class C>
ConvVariant variant(const char* type, const char* what, double rate) {
  constexpr bool kCopies = C::kVector * sizeof(T) >= 4, kSpreads = kPass != Pass::kFprop;
  constexpr bool kTf32 = std::is_same_v<typename C::Math, Tf32Math>;
  const char* needs = C::kVector == 1        ? ""
                      : C::kVector == kWhole ? "channels_last, channels of a group in multiples of 16 bytes"
                                             : "channels_last, channels of a group in multiples of 8 bytes";
  return {{name_of(type, what),
           ConvVariant::kOps[kFamily],
           kArch,
           {C::kTileA, C::kTileB, C::kTileDepth},
           C::kStages,
           C::kThreads,
           Operands<kPass, C>::kSharedBytes,
           needs,
           kEpilogueUses | uses::kLoadStore | C::Math::kUses | (kSpreads ? uses::kShuffle : uses::kNothing) |
               (kTf32 && kPass != Pass::kWgrad ? uses::kLdmatrix : uses::kNothing) |
               (kCopies ? uses::kSmemAddress | uses::kCpAsync : uses::kNothing)},
          kPass,
          kDType,
          kTf32,
          C::kVector,
          C::kBlocks,
          rate,
          [](const KernelInfo& info, const ConvLaunch& planned, Stream stream) {
            launch(info, &conv2d_kernel<kPass, C>, planned.shape, stream, planned.params);
          }};
}

[[maybe_unused]] ConvVariant stem(const StemTiles& tiles, int a, int b, int depth, int blocks, double rate,
                                  Instructions uses, ConvVariant::Run run) {
  const std::string size = std::to_string(a) + "x" + std::to_string(b);
  ConvVariant made{{name_of(kType, (size + "_stem_s" + std::to_string(tiles.stride)).c_str()),
                    ConvVariant::kOps[kFamily],
                    kArch,
                    {a, b, depth},
                    0,
                    kStemThreads,
                    -1,
                    kBackward ? "an image of at most 4 channels, no groups, its own stride, filters in multiples of 8"
                              : "an image of at most 4 channels, no groups or residual, its own stride",
                    uses::kLoadStore | HalfMath<T>::kUses | uses},
                   kPass,
                   kDType,
                   false,
                   1,
                   blocks,
                   rate,
                   run};
  made.stem = tiles;
  return made;
}
constexpr int kStemDepth = kStemTaps * kStemChannels;
template <int kFilters, int kStride>
ConvVariant stem(double rate) {
  using C = StemConfig<T, kFilters, kStride>;
  return stem({kFilters, kStride, 0}, kStemPixels, kFilters, kStemDepth, C::kBlocks, rate, kEpilogueUses,
              [](const KernelInfo& info, const ConvLaunch& planned, Stream stream) {
                launch(info, &conv2d_stem_kernel<C>, planned.shape, stream, *planned.stem);
              });
}
template <int kFilters, int kStride, int kWarpsA, int kStepsOfWarp>
ConvVariant stem_wgrad(double rate) {
  using C = StemWgradConfig<T, kFilters, kStride, kWarpsA, kStepsOfWarp>;
  constexpr int kSteps = C::kSteps * C::kWarpsB;
  return stem({C::kFilters, kStride, kSteps}, C::kFilters, kSteps * kStemDepth, kStemPixels, C::kBlocks, rate,
              uses::kCpAsync, [](const KernelInfo& info, const ConvLaunch& planned, Stream stream) {
                launch(info, &conv2d_stem_wgrad_kernel<C>, planned.shape, stream, *planned.stem);
              });
}
template <int kStride>
void register_stems() {
  if constexpr (kPass == Pass::kFprop) {
    Register<ConvVariant>(kFamily, {stem<64, kStride>(1), stem<48, kStride>(0.8), stem<32, kStride>(0.7)});
  } else {
    Register<ConvVariant>(kFamily, {stem_wgrad<64, kStride, 1, 4>(1), stem_wgrad<64, kStride, 4, 4>(0.6),
                                    stem_wgrad<32, kStride, 2, 2>(0.5)});
  }
}

// Rates: what of the tensor cores' time their loop leaves them. The smaller a tile, the more it brings from L2 for a
// product, and the smaller a warp's part of it, the more that loads from shared memory; narrow vectors cost more
// copies, and to gather an address for every element.
template <class Math>
void register_tensor_cores(const char* type) {
  Register<ConvVariant>(kFamily, {variant<Config<Math, 128, 128, 2, 2, 2>>(type, "128x128", 1),
                                  variant<Config<Math, 128, 64, 2, 2, 3>>(type, "128x64", 0.8),
                                  variant<Config<Math, 64, 64, 2, 2, 4>>(type, "64x64", 0.6)});
  if constexpr (sizeof(T) == 2) {
    Register<ConvVariant>(kFamily, {variant<Config<Math, 256, 128, 4, 2, 1>>(type, "256x128", 1),
                                    variant<Config<Math, 256, 64, 4, 1, 2>>(type, "256x64", 1)});
    if constexpr (kPass == Pass::kWgrad) {
      // Few filters, but many taps
      Register<ConvVariant>(kFamily, {variant<Config<Math, 96, 128, 2, 2, 2>>(type, "96x128", 0.95),
                                      variant<Config<Math, 64, 128, 2, 2, 3>>(type, "64x128", 0.8),
                                      variant<Config<Math, 32, 256, 1, 4, 2>>(type, "32x256", 0.75),
                                      variant<Config<Math, 64, 128, 2, 2, 2, kNarrow>>(type, "64x128_narrow", 0.7),
                                      variant<Config<Math, 96, 128, 2, 2, 2, kNarrow>>(type, "96x128_narrow", 0.8)});
    } else {
      Register<ConvVariant>(kFamily, {variant<Config<Math, 128, 96, 2, 2, 2>>(type, "128x96", 0.95),
                                      variant<Config<Math, 256, 48, 4, 1, 2>>(type, "256x48", 0.8),
                                      variant<Config<Math, 256, 32, 4, 1, 2>>(type, "256x32", 0.7),
                                      variant<Config<Math, 128, 64, 2, 2, 2, kNarrow>>(type, "128x64_narrow", 0.7)});
    }
    if constexpr (kPass == Pass::kFprop) {
      // AlexNet's first layer
      Register<ConvVariant>(kFamily, {variant<Config<Math, 128, 96, 2, 2, 2, kNarrow>>(type, "128x96_narrow", 0.8)});
    }
    if constexpr (kPass != Pass::kDgrad) register_stems<1>(), register_stems<2>(), register_stems<4>();
  }
  Register<ConvVariant>(kFamily, {variant<Config<Math, 64, 64, 4, 2, 1, 1>>(type, "gather", 0.1)});
}

const bool registered = [] {
  register_reduction({kPass, kDType, kReduction, &reduce});
  if constexpr (sizeof(T) == 2) {
    register_tensor_cores<HalfMath<T>>(kType);
  } else {
    register_tensor_cores<Tf32Math>("tf32");
    // Without tensor cores one size of tiles does, whose accumulators leave room for loads.
    Register<ConvVariant>(kFamily, {variant<Config<FloatMath, 64, 64, 2, 2, 3>>("fp32", "64x64", 0.8),
                                    variant<Config<FloatMath, 64, 64, 4, 2, 1, 1>>("fp32", "gather", 0.4)});
  }
  return true;
}();

}  // namespace
}  // namespace fastconv::cuda
