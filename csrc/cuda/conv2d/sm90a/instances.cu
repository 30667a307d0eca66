// The Hopper kernels of one pass and one dtype. The build compiles this file for each of them, see _build/sources.py:
// FASTCONV_PASS is kFprop, kDgrad or kWgrad, FASTCONV_DTYPE is kFloat16 or kBFloat16.
#include "cuda/conv2d/plan.h"
#include "cuda/conv2d/sm90a/halo.cuh"
#include "cuda/conv2d/sm90a/halo_wgrad.cuh"
#include "cuda/conv2d/sm90a/kernel.cuh"

namespace fastconv::cuda {
namespace {

constexpr Pass kPass = Pass::FASTCONV_PASS;
constexpr DType kDType = DType::FASTCONV_DTYPE;
constexpr int kFamily = static_cast<int>(kPass);
constexpr bool kIsHalf = kDType == DType::kFloat16;

using T = std::conditional_t<kIsHalf, Half, BFloat16>;

// Of all kernels
constexpr Instructions kUses =
    uses::kSmemAddress | uses::kMbarrier | uses::kTmaIm2col | uses::kLoadStore | uses::kShuffle |
    (kIsHalf ? uses::kWgmmaHalf | uses::kConvertHalf : uses::kWgmmaBFloat16 | uses::kConvertBFloat16) |
    (kPass == Pass::kFprop ? uses::kActivate : uses::kNothing);

template <class C>
constexpr Instructions uses_of() {
  if constexpr (!C::kHasHalo) {
    return kUses | uses::kSetmaxnreg | uses::kTmaTiled | uses::kTmaStore | uses::kStmatrix | uses::kNamedBarrier |
           uses::kProxyFence | (C::kCluster > 1 ? uses::kCluster | uses::kTmaMulticast : uses::kNothing);
  } else if constexpr (kPass == Pass::kWgrad) {
    return kUses | uses::kWgmmaRows;
  } else {
    return kUses | uses::kSetmaxnreg | uses::kWgmmaRows | uses::kTmaTiled | uses::kStmatrix | uses::kNamedBarrier |
           (kPass == Pass::kFprop ? uses::kLdmatrix | uses::kProxyFence : uses::kNothing);
  }
}

template <class C>
constexpr auto kernel_of() {
  if constexpr (!C::kHasHalo) {
    return &conv2d_box_kernel<kPass, C>;
  } else if constexpr (kPass == Pass::kWgrad) {
    return &conv2d_halo_wgrad_kernel<C>;
  } else {
    return &conv2d_halo_kernel<kPass, C>;
  }
}

template <class C>
ConvVariant variant(const char* what, double rate) {
  ConvVariant found{};
  found.info = {std::string(ConvVariant::kOps[kFamily]) + (kIsHalf ? "_fp16_" : "_bf16_") + what + "_sm90a",
                ConvVariant::kOps[kFamily],
                kArch,
                {C::kTileA, C::kTileB, kBox},
                C::kStages,
                C::kThreads,
                C::kSharedBytes,
                C::kNeeds,
                uses_of<C>()};
  found.pass = kPass;
  found.dtype = kDType;
  found.vector = 8;
  found.boxes = true;
  found.halo = C::kHasHalo;
  found.cluster = C::kCluster;
  found.resident = 1;
  found.rate = rate;
  found.run = [](const KernelInfo& info, const ConvLaunch& planned, Stream stream) {
    launch(info, kernel_of<C>(), planned.shape, stream, *planned.boxes);
  };
  return found;
}

// Stages fill the 227 KiB. Rates: beside mma.sync's largest tile, by what L2 can bring for a tile's products.
template <int kTileA, int kTileB, int kStages, bool kTogether, int kCluster = 1>
using Config = BoxConfig<T, kTileA, kTileB, kStages, kTogether, kCluster>;
std::vector<ConvVariant> variants() {
  std::vector<ConvVariant> found{
      variant<Config<128, 256, 4, true>>("128x256", 1.4),  variant<Config<128, 256, 4, true, 2>>("128x256_pair", 1.7),
      variant<Config<128, 192, 4, true>>("128x192", 1.25), variant<Config<128, 192, 4, true, 2>>("128x192_pair", 1.6),
      variant<Config<256, 128, 4, true>>("256x128", 1.4),  variant<Config<256, 128, 4, true, 2>>("256x128_pair", 1.6),
      variant<Config<128, 128, 6, false>>("128x128", 1.1), variant<Config<128, 128, 6, false, 2>>("128x128_pair", 1.4),
      variant<Config<256, 64, 4, true>>("256x64", 0.9)};
  if constexpr (kPass == Pass::kWgrad) {
    found.push_back(variant<HaloWgradConfig<T>>("64x576_halo", 1.6));
  } else {
    found.push_back(variant<HaloConfig<T, 9>>("256x64_halo", 1.6));
  }
  return found;
}
const Register<ConvVariant> registered(kFamily, variants());

}  // namespace
}  // namespace fastconv::cuda
