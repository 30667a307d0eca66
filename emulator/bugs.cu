// Kernels with one bug each, planted by a template parameter: what the emulator is there to catch. test_emulator.py
// runs them.
#include <cstring>

#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/launch.cuh"
#include "planted.h"

namespace fastconv::cuda {
namespace {

enum Bug {
  kNone,
  // ---- in the GEMM
  kWaitOneGroupShort,
  kNoBarrierAfterWait,
  kRowPastTheEnd,
  kNoZeroFill,
  kOtherSwizzle,
  kFragmentsSwapped,
  kTailNotMasked,
  kNoBarrierBeforeStaging,
  kNoBarrierAfterStaging,
  kBiasPastTheEnd,
  kStorePastTheEnd,
  kRefillsTheStageInUse,
  kMisalignedCopy,
  kMisalignedLdmatrix,
  kCopiesLeftBehind,
  kBlocksOverlap,
  kWritesItsInput,
  kRowNotWritten,
  kSharedMemoryTooSmall,
  kTooManyThreads,
  kStoresIntoTheGap,
  kMisalignedVector,
  kLdmatrixInHalfAWarp,
  kStagingRowsOverlap,
  kOvertakesACopy,
  kWaitWithoutCommit,
  // ---- in the exchange
  kNoSyncwarp,
  kBarrierInHalfTheBlock,
  kBarriersOnTwoLines,
  kEarlyReturn,
  kBarrierAgainstSyncwarp,
  kShuffleFromAnIdleLane,
  kShuffleNotInItsMask,
  kSumNeverCleared,
  kTwoThreadsOneElement,
  kNoBarrierBetweenWarps,
  kReadsAnotherBlock,
  kSharedPastTheEnd,
  kSharedBeforeTheBegin,
  kBugs,
};

// ---- c[m, n] = sum of a[m, k] b[n, k] over k, + bias[n]: a pipeline like that of the convolutions

struct GemmParams {
  const Half *a, *b, *bias;
  Half* c;
  int m, n, k;
  int pitch;  // elements between rows of c
};

constexpr int kTile = 64, kTileK = 32, kStages = 3, kThreads = 128, kStagingPitch = kTile + 8;
constexpr uint32_t kOperandBytes = kTile * kTileK * 2, kStageBytes = 2 * kOperandBytes;

// Byte of the 16-byte chunk (0 ... 3) of a row of 64 bytes
FASTCONV_DEVICE uint32_t swizzle(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

template <int kBug>
FASTCONV_KERNEL(kThreads, 1)
gemm(const __grid_constant__ GemmParams p) {
  unsigned char* shared = dynamic_smem<unsigned char>();
  const uint32_t base = ptx::smem_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = (kBug == kBlocksOverlap ? 0 : blockIdx.x) * kTile, n0 = blockIdx.y * kTile;
  const int chunk = thread % 4, row0 = thread / 4;
  const int steps = (p.k + kTileK - 1) / kTileK;

  const auto load_stage = [&](int step) {
    const uint32_t to = base + step % kStages * kStageBytes;
    const int k = step * kTileK + chunk * 8;
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + i * 32;
      const bool k_in = kBug == kTailNotMasked || k < p.k;
      const bool a_in = k_in && (m0 + row < p.m + (kBug == kRowPastTheEnd));
      const bool b_in = k_in && n0 + row < p.n;
      const int shift = kBug == kMisalignedCopy && step == 1 ? 2 : 0;
      if (kBug != kNoZeroFill || a_in) {
        ptx::cp_async<16>(to + swizzle(row, chunk), a_in ? p.a + (m0 + row) * p.k + k + shift : p.a, a_in);
      }
      ptx::cp_async<16>(to + kOperandBytes + swizzle(row, chunk), b_in ? p.b + (n0 + row) * p.k + k : p.b, b_in);
    }
  };

  float sum[4][2][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_stage(step);
    if (kBug != kWaitWithoutCommit) ptx::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if constexpr (kBug == kWaitOneGroupShort) {
      ptx::cp_async_wait<kStages - 1>();
    } else {
      ptx::cp_async_wait<kStages - 2>();
    }
    if (kBug != kNoBarrierAfterWait) __syncthreads();
    if (kBug == kRefillsTheStageInUse) {
      if (step + 1 < steps) load_stage(step);
    } else if (step + kStages - 1 < steps) {
      load_stage(step + kStages - 1);
    }
    if (kBug == kOvertakesACopy && step + kStages - 1 < steps) {
      shared[(step + kStages - 1) % kStages * kStageBytes + swizzle(row0, chunk)] = 0;
    }
    if (kBug != kWaitWithoutCommit) ptx::cp_async_commit();
    const uint32_t a = base + step % kStages * kStageBytes, b = a + kOperandBytes;
    for (int half = 0; half < 2; ++half) {
      uint32_t left[4][4], right[4];
      for (int i = 0; i < 4; ++i) {
        const int row = i * 16 + lane % 16, column = half * 2 + lane / 16;
        uint32_t at = a + (kBug == kOtherSwizzle ? row * 64 + ((column ^ (row & 3)) << 4) : swizzle(row, column));
        if (kBug == kMisalignedLdmatrix) at += lane == 5 ? 8 : 0;
        if (kBug != kLdmatrixInHalfAWarp || lane < 16) ptx::ldmatrix_x4(left[i], at);
      }
      ptx::ldmatrix_x4(right, b + swizzle(warp * 16 + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
          const uint32_t pair[2] = {right[2 * j + (kBug == kFragmentsSwapped)],
                                    right[2 * j + (kBug != kFragmentsSwapped)]};
          ptx::mma_m16n8k16<Half>(sum[i][j], left[i], pair);
        }
      }
    }
  }
  if (kBug != kCopiesLeftBehind) {
    ptx::cp_async_wait<0>();
  } else {
    ptx::cp_async<16>(base + kStages * kStageBytes, p.a, true);
  }
  if (kBug != kNoBarrierBeforeStaging) __syncthreads();

  Half* staged = reinterpret_cast<Half*>(shared);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + lane / 4 + e / 2 * 8, column = warp * 16 + j * 8 + lane % 4 * 2 + e % 2;
        const bool in = n0 + column < p.n + (kBug == kBiasPastTheEnd);
        const float bias = in ? to_float(p.bias[n0 + column]) : 0.0f;
        staged[row * (kBug == kStagingRowsOverlap ? kTile - 1 : kStagingPitch) + column] =
            from_float<Half>(sum[i][j][e] + bias);
      }
    }
  }
  if (kBug != kNoBarrierAfterStaging) __syncthreads();
  if (kBug == kWritesItsInput && thread == 0) const_cast<Half*>(p.bias)[0] = staged[0];
  for (int i = thread; i < kTile * kTile / 8; i += kThreads) {
    const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
    if (m0 + row >= p.m - (kBug == kRowNotWritten)) continue;
    Half* to = p.c + (m0 + row) * p.pitch + n0 + column;
    if (kBug == kMisalignedVector) {
      store(to + 1, load<8>(staged + row * kStagingPitch + column));
      continue;
    }
    for (int e = 0; e < 8; ++e) {
      const int past = kBug == kStoresIntoTheGap || (kBug == kStorePastTheEnd && m0 + row == p.m - 1);
      if (n0 + column + e < p.n + past) to[e] = staged[row * kStagingPitch + column + e];
    }
  }
}

// ---- out[i] = sum of the 64 elements of in around i's block, in shared memory: barriers, shuffles, exchanges

struct ExchangeParams {
  const float* in;
  float* out;
};

template <int kBug>
FASTCONV_KERNEL(64, 1)
exchange(const __grid_constant__ ExchangeParams p) {
  float* shared = dynamic_smem<float>();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first = blockIdx.x * 64;
  const float mine = p.in[first + thread];

  // Neighbours in a warp
  shared[thread] = mine;
  if (kBug != kNoSyncwarp) __syncwarp();
  float value = shared[thread ^ 1] + mine;
  __syncwarp();
  value += shared[thread];
  value -= mine;
  if (kBug == kBarrierInHalfTheBlock) {
    if (warp == 0) __syncthreads();
  }
  if (kBug == kBarriersOnTwoLines) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (kBug == kEarlyReturn && thread >= 40) return;
  if (kBug == kBarrierAgainstSyncwarp) {
    if (lane < 16) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The sum over a warp, of pairs
  if (kBug == kShuffleFromAnIdleLane) {
    if (lane < 16) value += __shfl_xor_sync(0xffff, value, 16);
  }
  if (kBug == kShuffleNotInItsMask) value += __shfl_xor_sync(0xfffffffe, value, 2);
  for (int step = 2; step < 32; step *= 2) value += __shfl_xor_sync(0xffffffff, value, step);

  // The sum over the block
  if (kBug == kSumNeverCleared) {
    if (lane == 0) shared[64 + warp] += value;
  } else if (kBug == kTwoThreadsOneElement) {
    if (lane == 0) shared[64] = value;
    if (lane == 1) shared[65] = value;
  } else {
    if (lane == 0) shared[64 + warp] = value;
  }
  if (kBug != kNoBarrierBetweenWarps) __syncthreads();
  float sum = shared[64] + shared[65];
  if (kBug == kSharedPastTheEnd) sum += shared[66] - shared[66];
  if (kBug == kSharedBeforeTheBegin && thread == 0) shared[-1] = sum;
  if (kBug == kReadsAnotherBlock) sum += p.out[(first + thread + 64) % 256] * 0.0f;
  p.out[first + thread] = sum;
}

// ---- running them

template <int kBug>
void run_gemm(const GemmParams& p) {
  constexpr int kShared = kStages * kStageBytes + 16;
  static const KernelInfo info{"gemm", "bugs", {80}, {kTile, kTile, kTileK}, kStages, kThreads, -1, "", uses::kNothing};
  const LaunchShape shape{{static_cast<unsigned>(ceil_div(p.m, kTile)), static_cast<unsigned>(ceil_div(p.n, kTile))},
                          {kBug == kTooManyThreads ? 160u : unsigned{kThreads}},
                          kBug == kSharedMemoryTooSmall ? kShared - 32 - kOperandBytes : kShared};
  launch(info, &gemm<kBug>, shape, nullptr, p);
}

template <int kBug>
void run_exchange(const ExchangeParams& p) {
  static const KernelInfo info{"exchange", "bugs", {80}, {0, 0, 0}, 0, 64, 66 * 4, "", uses::kNothing};
  launch(info, &exchange<kBug>, {{4}, {64}, 66 * 4}, nullptr, p);
}

template <template <int> class Run, int... kBug, class P>
void dispatch(int bug, const P& p, std::integer_sequence<int, kBug...>) {
  ((bug == kBug ? Run<kBug>::run(p) : void()), ...);
}
template <int kBug>
struct Gemm {
  static void run(const GemmParams& p) { run_gemm<kBug>(p); }
};
template <int kBug>
struct Exchange {
  static void run(const ExchangeParams& p) { run_exchange<kBug>(p); }
};

}  // namespace
}  // namespace fastconv::cuda

using namespace fastconv::cuda;

// What the emulator says; "" when it has nothing to say. c's rows are `pitch` elements apart and hold n.
API const char* run_gemm(int bug, const void* a, const void* b, const void* bias, void* c, int m, int n, int k,
                         int pitch) {
  return attempt([&] {
    name("a", a, int64_t{m} * k * 2, false);
    name("b", b, int64_t{n} * k * 2, false);
    name("bias", bias, int64_t{n} * 2, false);
    name("c", c, (int64_t{m - 1} * pitch + n) * 2, true, int64_t{n} * 2, int64_t{pitch} * 2);
    const GemmParams p{static_cast<const Half*>(a),
                       static_cast<const Half*>(b),
                       static_cast<const Half*>(bias),
                       static_cast<Half*>(c),
                       m,
                       n,
                       k,
                       pitch};
    dispatch<Gemm>(bug, p, std::make_integer_sequence<int, kNoSyncwarp>());
  });
}

API const char* run_exchange(int bug, const void* in, void* out) {
  return attempt([&] {
    name("in", in, 256 * 4, false);
    name("out", out, 256 * 4, true);
    dispatch<Exchange>(bug, ExchangeParams{static_cast<const float*>(in), static_cast<float*>(out)},
                       std::make_integer_sequence<int, kBugs>());
  });
}
