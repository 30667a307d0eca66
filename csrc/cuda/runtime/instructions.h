// The functions of ptx/ and runtime/types.cuh that hardware might do otherwise than the emulator: every kernel of the
// table says which it uses, and every case of conformance/ which it tries.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

namespace fastconv::cuda {

// A set: some of `uses`, joined by |.
using Instructions = uint32_t;

namespace uses {
constexpr Instructions kNothing = 0;
constexpr Instructions kSmemAddress = 1 << 0;
constexpr Instructions kCpAsync = 1 << 1;  // with its groups and waits
constexpr Instructions kLdmatrix = 1 << 2;
constexpr Instructions kMmaHalf = 1 << 3;
constexpr Instructions kMmaBFloat16 = 1 << 4;
constexpr Instructions kMmaTf32 = 1 << 5;
constexpr Instructions kToTf32 = 1 << 6;
constexpr Instructions kConvertHalf = 1 << 7;
constexpr Instructions kConvertBFloat16 = 1 << 8;
constexpr Instructions kActivate = 1 << 9;
constexpr Instructions kPassesGradient = 1 << 10;
constexpr Instructions kRsqrt = 1 << 11;
constexpr Instructions kPower = 1 << 12;
constexpr Instructions kLoadStore = 1 << 13;
constexpr Instructions kShuffle = 1 << 14;
constexpr Instructions kSqrt = 1 << 15;
constexpr Instructions kLog2 = 1 << 16;
constexpr Instructions kExp2 = 1 << 17;
constexpr Instructions kMbarrier = 1 << 18;
constexpr Instructions kTmaTiled = 1 << 19;   // loads of boxes ...
constexpr Instructions kTmaIm2col = 1 << 20;  // ... of pixels as a filter position meets them
constexpr Instructions kTmaStore = 1 << 21;
constexpr Instructions kWgmmaHalf = 1 << 22;
constexpr Instructions kWgmmaBFloat16 = 1 << 23;
constexpr Instructions kStmatrix = 1 << 24;
constexpr Instructions kNamedBarrier = 1 << 25;
constexpr Instructions kProxyFence = 1 << 26;
constexpr Instructions kSetmaxnreg = 1 << 27;
constexpr Instructions kCluster = 1 << 28;       // its ranks and barriers, those of other blocks included
constexpr Instructions kTmaMulticast = 1 << 29;  // in whatever mode
constexpr Instructions kWgmmaRows = 1 << 30;     // whose operand begins in any of the eight rows of a swizzle

// Of a kernel whose variant serves all types
constexpr Instructions kConvert = kConvertHalf | kConvertBFloat16;
}  // namespace uses

// In the order of their bits
inline constexpr const char* kInstructionNames[] = {
    "smem_address",
    "cp_async",
    "ldmatrix",
    "mma_m16n8k16_f16",
    "mma_m16n8k16_bf16",
    "mma_m16n8k8_tf32",
    "to_tf32",
    "convert_f16",
    "convert_bf16",
    "activate",
    "passes_gradient",
    "rsqrt",
    "powf",
    "load_store",
    "shuffle",
    "sqrt",
    "log2",
    "exp2",
    "mbarrier",
    "tma_tiled",
    "tma_im2col",
    "tma_store",
    "wgmma_f16",
    "wgmma_bf16",
    "stmatrix",
    "named_barrier",
    "proxy_fence",
    "setmaxnreg",
    "cluster",
    "tma_multicast",
    "wgmma_rows",
};

// A list of their names
inline std::string names_as_json(Instructions instructions) {
  std::string text;
  for (size_t bit = 0; bit < std::size(kInstructionNames); ++bit) {
    if (instructions >> bit & 1) text += (text.empty() ? "\"" : ", \"") + std::string(kInstructionNames[bit]) + "\"";
  }
  return "[" + text + "]";
}

}  // namespace fastconv::cuda
