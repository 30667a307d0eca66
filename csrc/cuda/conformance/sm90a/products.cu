// The cases of products of a warpgroup.
#include "cuda/conformance/sm90a/case.cuh"

namespace fastconv::cuda::inline sm90a {
namespace conformance {

using enum ptx::Major;

struct WgmmaOperand {
  static constexpr int kThreads = 32, kIn = 32, kOut = 128, kSharedBytes = 0;
  static FASTCONV_DEVICE void run(const Params& p, int lane, uint32_t*) {
    const uint32_t address = p.in[lane] & 0x3fff0;
    const uint64_t both[] = {ptx::wgmma_operand<kDepth>(address), ptx::wgmma_operand<kExtent>(address, 1024 * lane)};
    for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = static_cast<uint32_t>(both[i / 2] >> i % 2 * 32);
  }
};

// 64 x kN sums over 64 places of the depth; then, after they have been touched, over the middle ones of them again. Of
// a thread each 32 are folded into a word. Of rounded ones the first 16 places, one sum of each thread. B may begin in
// a row that is not the first of eight.
template <class T, ptx::Major kMajorA, ptx::Major kMajorB, int kN, bool kRounded = false, int kFirstRow = 0,
          int kNextRows = 64>
struct Wgmma {
  static constexpr int kThreads = 128, kSums = kN / 2, kWordsA = 64 * kRowWords;
  static constexpr int kIn = kWordsA + (kN + kFirstRow) * kRowWords;
  static constexpr int kOut = kThreads * (kRounded ? 1 : kSums / 32), kSharedBytes = 4 * kIn;
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    for (int i = thread; i < kIn; i += kThreads) shared[swizzled(i)] = p.in[i];
    ptx::fence_proxy_async();
    __syncthreads();
    constexpr int kStepA = kMajorA == kDepth ? 2 : 128, kStepB = kMajorB == kDepth ? 2 : 128;
    const uint32_t address = ptx::smem_address(shared);
    const uint64_t a = ptx::wgmma_operand<kMajorA>(address);
    const uint64_t b =
        ptx::wgmma_operand<kMajorB>(address + 4 * kWordsA + kFirstRow * kBoxRowBytes, kNextRows * kBoxRowBytes);
    const auto add = [&](float (&d)[kSums], int first, int last, bool accumulate) {
      ptx::wgmma_fence();
#pragma unroll
      for (int k = first; k < last; ++k) {
        ptx::wgmma<T, kMajorA, kMajorB>(d, a + k * kStepA, b + k * kStepB, accumulate || k > first);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    };
    float d[kSums];
    for (int i = 0; i < kSums; ++i) d[i] = static_cast<float>(thread + i);
    if constexpr (kRounded) {
      add(d, 0, 1, false);
      float mine = 0.0f;
      for (int i = 0; i < kSums; ++i) mine = i == thread % kSums ? d[i] : mine;
      p.out[thread] = __float_as_uint(mine);
    } else {
      add(d, 0, 4, false);
      for (int i = 0; i < kSums; ++i) d[i] += static_cast<float>(thread - 3 * i);
      add(d, 1, 3, true);
      for (int word = 0; word < kSums / 32; ++word) {
        uint32_t folded = 0;
        for (int i = 0; i < 32; ++i) folded = 31 * folded + __float_as_uint(d[32 * word + i]);
        p.out[thread * (kSums / 32) + word] = folded;
      }
    }
  }
};

// For 64, 128, 192 and 256 columns, both majors of each operand
#define FASTCONV_WGMMA_CASES(T, type, n)                                                                         \
  make<Wgmma<T, kDepth, kDepth, n>>("wgmma<" #T "> of " #n " columns", uses::kWgmma##T, type),                   \
      make<Wgmma<T, kDepth, kExtent, n>>("wgmma<" #T "> of " #n " columns, b by extent", uses::kWgmma##T, type), \
      make<Wgmma<T, kExtent, kDepth, n>>("wgmma<" #T "> of " #n " columns, a by extent", uses::kWgmma##T, type), \
      make<Wgmma<T, kExtent, kExtent, n>>("wgmma<" #T "> of " #n " columns, both by extent", uses::kWgmma##T, type)
const RegisterCases products{
    make<WgmmaOperand>("wgmma_operand", uses::kNothing),
    FASTCONV_WGMMA_CASES(Half, "wgmma half integers", 64),
    FASTCONV_WGMMA_CASES(Half, "wgmma half integers", 128),
    FASTCONV_WGMMA_CASES(Half, "wgmma half integers", 192),
    FASTCONV_WGMMA_CASES(Half, "wgmma half integers", 256),
    FASTCONV_WGMMA_CASES(BFloat16, "wgmma bfloat16 integers", 64),
    FASTCONV_WGMMA_CASES(BFloat16, "wgmma bfloat16 integers", 128),
    FASTCONV_WGMMA_CASES(BFloat16, "wgmma bfloat16 integers", 192),
    FASTCONV_WGMMA_CASES(BFloat16, "wgmma bfloat16 integers", 256),
    make<Wgmma<Half, kDepth, kDepth, 128, false, 1>>("wgmma<Half> from row 1", uses::kWgmmaHalf | uses::kWgmmaRows,
                                                     "wgmma half integers"),
    make<Wgmma<Half, kExtent, kDepth, 128, false, 6>>("wgmma<Half> from row 6, a by extent",
                                                      uses::kWgmmaHalf | uses::kWgmmaRows, "wgmma half integers"),
    make<Wgmma<Half, kExtent, kExtent, 192, false, 5, 1>>("wgmma<Half> from rows 5, 6, 7, both by extent",
                                                          uses::kWgmmaHalf | uses::kWgmmaRows, "wgmma half integers"),
    make<Wgmma<BFloat16, kExtent, kExtent, 192, false, 7, 3>>("wgmma<BFloat16> from rows 7, 10, 13, both by extent",
                                                              uses::kWgmmaBFloat16 | uses::kWgmmaRows,
                                                              "wgmma bfloat16 integers"),
    make<Wgmma<Half, kDepth, kDepth, 64, true>>("wgmma<Half>, rounded", uses::kWgmmaHalf, "wgmma half fractions",
                                                false),
    make<Wgmma<BFloat16, kDepth, kDepth, 64, true>>("wgmma<BFloat16>, rounded", uses::kWgmmaBFloat16,
                                                    "wgmma bfloat16 fractions", false),
};
#undef FASTCONV_WGMMA_CASES

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm90a
