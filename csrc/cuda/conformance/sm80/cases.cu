// The cases for ptx/sm80.cuh and runtime/types.cuh, each a kernel of one warp.
#include "cuda/conformance/conformance.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm80 {
namespace conformance {

struct Params {
  const uint32_t* in;
  uint32_t* out;
};

constexpr int kSharedBytes = 4096;

template <class Case>
FASTCONV_KERNEL(32, 1)
run(const __grid_constant__ Params p) {
  Case::run(p.in, p.out, static_cast<int>(threadIdx.x), dynamic_smem<uint32_t>());
}

FASTCONV_DEVICE void fill(uint32_t* shared, const uint32_t* in, int words, int lane) {
  for (int i = lane; i < words; i += 32) shared[i] = in[i];
  __syncwarp();
}

// ---- shared memory and asynchronous copies

struct SmemAddress {
  static constexpr int kIn = 1, kOut = 64;
  static FASTCONV_DEVICE void run(const uint32_t*, uint32_t* out, int lane, uint32_t* shared) {
    out[lane] = ptx::smem_address(shared + lane) - ptx::smem_address(shared);
    out[32 + lane] = ptx::smem_address(shared) % 128;
  }
};

// Every third lane's copy is switched off, and those lanes' words become 0.
template <int kBytes>
struct CpAsync {
  static constexpr int kWords = kBytes / 4, kIn = 32 * kWords, kOut = kIn;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t* shared) {
    for (int i = lane; i < kIn; i += 32) shared[i] = 0x55555555;
    __syncwarp();
    // Where nothing is read, the address is one at which nothing is.
    const bool exists = lane % 3 != 0;
    const auto* const nowhere = reinterpret_cast<const uint32_t*>(uintptr_t{4096});
    ptx::cp_async<kBytes>(ptx::smem_address(shared + lane * kWords), exists ? in + (lane ^ 9) * kWords : nowhere,
                          exists);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    for (int i = lane; i < kIn; i += 32) out[i] = shared[i];
  }
};

// Three groups, the second of which is empty, waited for one by one
struct CpAsyncGroups {
  static constexpr int kIn = 256, kOut = 64;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t* shared) {
    ptx::cp_async<16>(ptx::smem_address(shared + lane * 4), in + lane * 4, true);
    ptx::cp_async_commit();
    ptx::cp_async_commit();
    ptx::cp_async<16>(ptx::smem_address(shared + 128 + lane * 4), in + 128 + lane * 4, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncwarp();
    out[lane] = shared[(lane ^ 7) * 4 + 1];
    ptx::cp_async_wait<1>();
    ptx::cp_async_wait<0>();
    __syncwarp();
    out[32 + lane] = shared[128 + (lane ^ 7) * 4 + 2];
  }
};

// ---- tensor cores

// Rows of 16 bytes lie 32 bytes apart, permuted over the lanes.
template <int kMatrices, bool kTransposed>
struct Ldmatrix {
  static constexpr int kIn = 256, kOut = 32 * kMatrices;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t* shared) {
    fill(shared, in, kIn, lane);
    const uint32_t address = ptx::smem_address(shared + (lane ^ 5) * 8);
    uint32_t fragments[kMatrices];
    if constexpr (kMatrices == 4 && kTransposed) ptx::ldmatrix_x4_trans(fragments, address);
    if constexpr (kMatrices == 4 && !kTransposed) ptx::ldmatrix_x4(fragments, address);
    if constexpr (kMatrices == 2 && kTransposed) ptx::ldmatrix_x2_trans(fragments, address);
    if constexpr (kMatrices == 2 && !kTransposed) ptx::ldmatrix_x2(fragments, address);
    for (int i = 0; i < kMatrices; ++i) out[lane * kMatrices + i] = fragments[i];
  }
};

// in: four words of a for each lane, then two of b, then four of d
template <class T>
struct Mma {
  static constexpr int kIn = 320, kOut = 128;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t*) {
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = in[lane * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = in[128 + lane * 2 + i];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[192 + lane * 4 + i]);
    if constexpr (sizeof(T) == 4) {
      ptx::mma_m16n8k8_tf32(d, a, b);
    } else {
      ptx::mma_m16n8k16<T>(d, a, b);
    }
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = __float_as_uint(d[i]);
  }
};

// ---- numbers; every lane takes eight words

template <class F>
struct EachWord {
  static constexpr int kIn = 256, kOut = 256;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t*) {
    for (int i = lane; i < kIn; i += 32) out[i] = F::of(in[i]);
  }
};

struct ToTf32 {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return ptx::to_tf32(__uint_as_float(word)); }
};
template <class T>
struct Pack {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) {
    return pack2<T>(__uint_as_float(word), -1.5f * __uint_as_float(word));
  }
};
template <class T>
struct UnpackLow {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return __float_as_uint(unpack2<T>(word).x); }
};
template <class T>
struct UnpackHigh {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return __float_as_uint(unpack2<T>(word).y); }
};
template <Activation kActivation>
struct Activate {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) {
    return __float_as_uint(activate(__uint_as_float(word), kActivation));
  }
};
template <Activation kActivation>
struct Passes {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return passes_gradient(__uint_as_float(word), kActivation); }
};
struct Rsqrt {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) {
    return __float_as_uint(ptx::rsqrt_approx(__uint_as_float(word)));
  }
};
struct Sqrt {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return __float_as_uint(ptx::sqrt_approx(__uint_as_float(word))); }
};
// Its error is an absolute one near 1: away from 0 it is within what rounded results are allowed.
struct Log2 {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) {
    return __float_as_uint(64.0f + ptx::log2_approx(__uint_as_float(word)));
  }
};
struct Exp2 {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) {
    return __float_as_uint(ptx::exp2_approx(-0.75f * ptx::log2_approx(__uint_as_float(word))));
  }
};
struct Power {
  static FASTCONV_DEVICE uint32_t of(uint32_t word) { return __float_as_uint(powf(__uint_as_float(word), -0.75f)); }
};

template <class T, int N>
struct LoadStore {
  static constexpr int kWords = sizeof(T) * N / 4, kIn = 32 * (kWords ? kWords : 1), kOut = kIn;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t* shared) {
    if (kWords == 0) out[lane] = 0;
    const int at = lane * (kWords ? N : 2);
    T* staged = reinterpret_cast<T*>(shared);
    store(staged + at, load<N>(reinterpret_cast<const T*>(in) + at));
    __syncwarp();
    const int other = (lane ^ 3) * (kWords ? N : 2);
    store(reinterpret_cast<T*>(out) + at, load<N>(staged + other));
  }
};

// ---- shuffles

struct Shuffles {
  static constexpr int kIn = 32, kOut = 224;
  static FASTCONV_DEVICE void run(const uint32_t* in, uint32_t* out, int lane, uint32_t*) {
    const uint32_t mine = in[lane];
    out[lane] = __shfl_xor_sync(0xffffffff, mine, 5);
    out[32 + lane] = __shfl_sync(0xffffffff, mine, lane * 7);
    out[64 + lane] = __shfl_sync(0xffffffff, mine, lane + 3, 8);
    out[96 + lane] = __shfl_up_sync(0xffffffff, mine, 3);
    out[128 + lane] = __shfl_down_sync(0xffffffff, mine, 5, 16);
    out[160 + lane] = __shfl_xor_sync(0xffffffff, mine, 12, 8);
    out[192 + lane] = __ballot_sync(0xffffffff, mine % 3 == 0);
  }
};

template <class C>
void launch_case(const ConformanceCase& self, const uint32_t* in, uint32_t* out, Stream stream) {
  const KernelInfo info{self.name, "conformance", kArch, {0, 0, 0}, 0, 32, kSharedBytes, "", self.uses};
  launch(info, &run<C>, {{1}, {32}, kSharedBytes}, stream, Params{in, out});
}

template <class C>
ConformanceCase make(const char* name, Instructions uses, const char* input, bool exact = true) {
  return {name, uses, input, C::kIn, C::kOut, exact, kArch, &launch_case<C>};
}

using enum Activation;
const RegisterCases registered{
    make<SmemAddress>("smem_address", uses::kSmemAddress, "bits"),
    make<CpAsync<4>>("cp_async<4>", uses::kCpAsync, "bits"),
    make<CpAsync<8>>("cp_async<8>", uses::kCpAsync, "bits"),
    make<CpAsync<16>>("cp_async<16>", uses::kCpAsync, "bits"),
    make<CpAsyncGroups>("cp_async_wait", uses::kCpAsync, "bits"),
    make<Ldmatrix<4, false>>("ldmatrix_x4", uses::kLdmatrix, "bits"),
    make<Ldmatrix<4, true>>("ldmatrix_x4_trans", uses::kLdmatrix, "bits"),
    make<Ldmatrix<2, false>>("ldmatrix_x2", uses::kLdmatrix, "bits"),
    make<Ldmatrix<2, true>>("ldmatrix_x2_trans", uses::kLdmatrix, "bits"),
    make<Mma<Half>>("mma_m16n8k16<Half>", uses::kMmaHalf, "mma half integers"),
    make<Mma<BFloat16>>("mma_m16n8k16<BFloat16>", uses::kMmaBFloat16, "mma bfloat16 integers"),
    make<Mma<float>>("mma_m16n8k8_tf32", uses::kMmaTf32, "mma tf32 integers"),
    make<Mma<float>>("mma_m16n8k8_tf32, low bits set", uses::kMmaTf32, "mma tf32 low bits"),
    make<Mma<Half>>("mma_m16n8k16<Half>, rounded", uses::kMmaHalf, "mma half fractions", false),
    make<Mma<BFloat16>>("mma_m16n8k16<BFloat16>, rounded", uses::kMmaBFloat16, "mma bfloat16 fractions", false),
    make<Mma<float>>("mma_m16n8k8_tf32, rounded", uses::kMmaTf32, "mma tf32 fractions", false),
    make<EachWord<ToTf32>>("to_tf32", uses::kToTf32, "floats"),
    make<EachWord<Pack<Half>>>("pack2<Half>", uses::kConvertHalf, "floats"),
    make<EachWord<Pack<BFloat16>>>("pack2<BFloat16>", uses::kConvertBFloat16, "floats"),
    make<EachWord<UnpackLow<Half>>>("unpack2<Half>.x", uses::kConvertHalf, "floats"),
    make<EachWord<UnpackHigh<Half>>>("unpack2<Half>.y", uses::kConvertHalf, "floats"),
    make<EachWord<UnpackLow<BFloat16>>>("unpack2<BFloat16>.x", uses::kConvertBFloat16, "floats"),
    make<EachWord<UnpackHigh<BFloat16>>>("unpack2<BFloat16>.y", uses::kConvertBFloat16, "floats"),
    make<EachWord<Activate<kRelu>>>("activate relu", uses::kActivate, "floats"),
    make<EachWord<Activate<kRelu6>>>("activate relu6", uses::kActivate, "floats"),
    make<EachWord<Passes<kRelu>>>("passes_gradient relu", uses::kPassesGradient, "floats"),
    make<EachWord<Passes<kRelu6>>>("passes_gradient relu6", uses::kPassesGradient, "floats"),
    make<EachWord<Rsqrt>>("rsqrt_approx", uses::kRsqrt, "positive floats", false),
    make<EachWord<Sqrt>>("sqrt_approx", uses::kSqrt, "positive floats", false),
    make<EachWord<Log2>>("log2_approx", uses::kLog2, "positive floats", false),
    make<EachWord<Exp2>>("exp2_approx", uses::kLog2 | uses::kExp2, "positive floats", false),
    make<EachWord<Power>>("powf", uses::kPower, "positive floats", false),
    make<LoadStore<Half, 1>>("load, store 2 bytes", uses::kLoadStore, "bits"),
    make<LoadStore<BFloat16, 2>>("load, store 4 bytes", uses::kLoadStore, "bits"),
    make<LoadStore<float, 2>>("load, store 8 bytes", uses::kLoadStore, "bits"),
    make<LoadStore<Half, 8>>("load, store 16 bytes", uses::kLoadStore, "bits"),
    make<Shuffles>("shuffles", uses::kShuffle, "bits"),
};

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm80
