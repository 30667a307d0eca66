// The cases of barriers, matrices and registers.
#include "cuda/conformance/sm90a/case.cuh"

namespace fastconv::cuda::inline sm90a {
namespace conformance {

// ---- barriers

// One warp hands words to another, through so many places. The barriers of a place are passed again and again.
template <int kPlaces>
struct Handing {
  static constexpr int kThreads = 64, kRounds = 7, kIn = 32 * kRounds, kOut = kIn, kSharedBytes = 144 * kPlaces;
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    const int lane = thread % 32;
    const uint32_t full = ptx::smem_address(shared + 32 * kPlaces), empty = full + 8 * kPlaces;
    if (thread == 0) {
      for (int i = 0; i < 2 * kPlaces; ++i) ptx::mbarrier_init(full + 8 * i, 32);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
      const int place = round % kPlaces;
      const uint32_t parity = round / kPlaces % 2;
      if (thread < 32) {
        ptx::mbarrier_wait(empty + 8 * place, parity ^ 1);
        shared[32 * place + lane] = p.in[32 * round + lane];
        ptx::mbarrier_arrive(full + 8 * place);
      } else {
        ptx::mbarrier_wait(full + 8 * place, parity);
        p.out[32 * round + lane] = shared[32 * place + (lane ^ 31)];
        ptx::mbarrier_arrive(empty + 8 * place);
      }
    }
  }
};

// Into a place a warp loads one box, another one two, and a third warp reads all.
struct Expecting {
  static constexpr int kThreads = 96, kPlaces = 2, kRounds = 5, kRows = 24;
  static constexpr int kPlaceWords = kRows * kRowWords;
  static constexpr int kIn = kRounds * kPlaceWords, kOut = kIn, kSharedBytes = kPlaces * (4 * kPlaceWords + 16);
  static TensorMap map(const uint32_t* in, uint32_t*) {
    return tiled_map({in, DType::kFloat16, 2, {kBoxChannels, kRounds * kRows, 1}, {kBoxChannels, 0}, {8, 1}});
  }
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    const int warp = thread / 32, lane = thread % 32;
    const uint32_t boxes = ptx::smem_address(shared), full = boxes + 4 * kPlaces * kPlaceWords;
    const uint32_t empty = full + 8 * kPlaces;
    if (thread == 0) {
      for (int i = 0; i < kPlaces; ++i) {
        ptx::mbarrier_init(full + 8 * i, 2);
        ptx::mbarrier_init(empty + 8 * i, 32);
      }
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
      const int place = round % kPlaces;
      const uint32_t parity = round / kPlaces % 2;
      if (warp < 2 && lane == 0) {
        ptx::mbarrier_wait(empty + 8 * place, parity ^ 1);
        ptx::mbarrier_arrive_expect(full + 8 * place, (8 + 8 * warp) * kBoxRowBytes);
        for (int i = 0; i <= warp; ++i) {
          const int box = warp + i;
          const uint32_t destination = boxes + 4 * kPlaceWords * place + 8 * kBoxRowBytes * box;
          ptx::tma_load_2d(destination, p.map, full + 8 * place, 0, kRows * round + 8 * box);
        }
      }
      if (warp == 2) {
        ptx::mbarrier_wait(full + 8 * place, parity);
        for (int i = lane; i < kPlaceWords; i += 32) p.out[kPlaceWords * round + i] = shared[kPlaceWords * place + i];
        ptx::mbarrier_arrive(empty + 8 * place);
      }
    }
  }
};

// Each pair of warps meets at a barrier of its own, one of them oftener.
struct NamedBarriers {
  static constexpr int kThreads = 128, kIn = 128, kOut = 128, kSharedBytes = 512;
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    const int pair = thread / 64, number = 1 + 14 * pair;
    uint32_t word = p.in[thread];
    for (int round = 0; round < 3 + 2 * pair; ++round) {
      shared[thread] = word;
      ptx::named_barrier_sync(number, 64);
      word = 3 * word + shared[thread ^ 37];
      ptx::named_barrier_sync(number, 64);
    }
    p.out[thread] = word;
  }
};

// ---- 8x8 matrices

// Rows of 16 bytes lie 32 bytes apart, permuted over the lanes. What lies between them stays.
template <bool kTransposed>
struct Stmatrix {
  static constexpr int kThreads = 32, kIn = 384, kOut = 256, kSharedBytes = 1024;
  static FASTCONV_DEVICE void run(const Params& p, int lane, uint32_t* shared) {
    for (int i = lane; i < kOut; i += 32) shared[i] = p.in[128 + i];
    __syncwarp();
    uint32_t fragments[4];
    for (int i = 0; i < 4; ++i) fragments[i] = p.in[4 * lane + i];
    const uint32_t address = ptx::smem_address(shared + 8 * (lane ^ 5));
    if constexpr (kTransposed) {
      ptx::stmatrix_x4_trans(address, fragments);
    } else {
      ptx::stmatrix_x4(address, fragments);
    }
    __syncwarp();
    for (int i = lane; i < kOut; i += 32) p.out[i] = shared[i];
  }
};

// ---- registers

// Two of three warpgroups take what the third gives up, and need it.
struct Registers {
  static constexpr int kThreads = 384, kIn = 384, kOut = 384, kSharedBytes = 0;
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t*) {
    if (thread < 128) {
      ptx::registers_decrease<40>();
      mix<12>(p, thread);
    } else {
      ptx::registers_increase<232>();
      mix<190>(p, thread);
    }
  }
  template <int kCount>
  static FASTCONV_DEVICE void mix(const Params& p, int thread) {
    uint32_t words[kCount], sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = p.in[(thread + i) % kIn];
#pragma unroll 1
    for (int round = 0; round < 3; ++round) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = 5 * words[i] + words[(i + 7) % kCount];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum = 3 * sum + words[i];
    p.out[thread] = sum;
  }
};

const RegisterCases registered{
    make<Handing<1>>("mbarrier", uses::kMbarrier),
    make<Handing<3>>("mbarrier, 3 places", uses::kMbarrier),
    make<Expecting>("mbarrier_arrive_expect", uses::kMbarrier | uses::kTmaTiled),
    make<NamedBarriers>("named_barrier_sync", uses::kNamedBarrier),
    make<Stmatrix<false>>("stmatrix_x4", uses::kStmatrix),
    make<Stmatrix<true>>("stmatrix_x4_trans", uses::kStmatrix),
    make<Registers>("registers_decrease, registers_increase", uses::kSetmaxnreg),
};

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm90a
