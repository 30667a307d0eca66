// The cases of clusters, and of boxes that come to several of their blocks.
#include "cuda/conformance/sm90a/case.cuh"

namespace fastconv::cuda::inline sm90a {
namespace conformance {

struct Ranks {
  static constexpr unsigned kBlocks = 4;
  static constexpr int kThreads = 32, kIn = 32, kOut = 128, kSharedBytes = 0;
  static FASTCONV_DEVICE void run(const Params& p, int lane, uint32_t*) {
    p.out[32 * blockIdx.x + lane] = p.in[lane] + ptx::cluster_rank();
    ptx::cluster_sync();
  }
};

// Blocks go on only when all of them have arrived, at each other's barriers.
struct RemoteArrivals {
  static constexpr unsigned kBlocks = 4;
  static constexpr int kThreads = 32, kRounds = 5, kIn = 32, kOut = kBlocks * kRounds, kSharedBytes = 8;
  static FASTCONV_DEVICE void run(const Params& p, int lane, uint32_t* shared) {
    const uint32_t barrier = ptx::smem_address(shared), rank = ptx::cluster_rank();
    if (lane == 0) {
      ptx::mbarrier_init(barrier, kBlocks);
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();
    for (int round = 0; round < kRounds; ++round) {
      if (lane < static_cast<int>(kBlocks)) ptx::mbarrier_arrive_at(barrier, lane);
      ptx::mbarrier_wait(barrier, round % 2);
      if (lane == 0) p.out[kRounds * rank + round] = p.in[round] * (rank + 1);
      ptx::cluster_sync();  // else one arrives twice in a phase of another
    }
  }
};

enum class Mode { k2d, k3d, kIm2col };

// Each of two blocks brings one box for both, and one for the other alone. All are of 8 rows.
template <Mode kMode>
struct Multicast {
  static constexpr unsigned kBlocks = 2;
  static constexpr int kThreads = 32, kBoxWords = 8 * kRowWords, kBoxes = 4, kIn = kBoxes * kBoxWords;
  static constexpr int kOut = kBlocks * 3 * kBoxWords, kSharedBytes = 3 * 4 * kBoxWords + 8;
  static TensorMap map(const uint32_t* in, uint32_t*) {
    if constexpr (kMode == Mode::k2d) {
      return tiled_map({in, DType::kFloat16, 2, {kBoxChannels, 8 * kBoxes, 1}, {kBoxChannels, 0}, {8, 1}});
    } else if constexpr (kMode == Mode::k3d) {
      const int image = 8 * kBoxChannels;
      return tiled_map({in, DType::kFloat16, 3, {kBoxChannels, 8, kBoxes}, {kBoxChannels, image}, {8, 1}});
    } else {
      return im2col_map({in, DType::kFloat16, kBoxes, 2, 4, kBoxChannels, 8 * kBoxChannels, 4 * kBoxChannels,
                         kBoxChannels, 0, 0, 1, 1, 2, 4, 8});
    }
  }
  static FASTCONV_DEVICE void run(const Params& p, int lane, uint32_t* shared) {
    const uint32_t boxes = ptx::smem_address(shared), barrier = boxes + 3 * 4 * kBoxWords;
    const int rank = static_cast<int>(ptx::cluster_rank());
    if (lane == 0) {
      ptx::mbarrier_init(barrier, 1);
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();
    if (lane == 0) {
      ptx::mbarrier_arrive_expect(barrier, 3 * 4 * kBoxWords);
      load(p, boxes + 4 * kBoxWords * rank, barrier, 0b11, rank);
      load(p, boxes + 2 * 4 * kBoxWords, barrier, static_cast<uint16_t>(rank == 0 ? 0b10 : 0b01), 2 + rank);
    }
    ptx::mbarrier_wait(barrier, 0);
    for (int i = lane; i < 3 * kBoxWords; i += 32) p.out[3 * kBoxWords * rank + i] = shared[swizzled(i)];
    ptx::cluster_sync();
  }
  static FASTCONV_DEVICE void load(const Params& p, uint32_t to, uint32_t barrier, uint16_t blocks, int box) {
    if constexpr (kMode == Mode::k2d) ptx::tma_multicast_2d(to, p.map, barrier, blocks, 0, 8 * box);
    if constexpr (kMode == Mode::k3d) ptx::tma_multicast_3d(to, p.map, barrier, blocks, 0, 0, box);
    if constexpr (kMode == Mode::kIm2col) ptx::tma_multicast_im2col(to, p.map, barrier, blocks, 0, 0, 0, box, 0, 0);
  }
};

const RegisterCases clusters{
    make<Ranks>("cluster_rank", uses::kCluster),
    make<RemoteArrivals>("mbarrier_arrive_at", uses::kCluster | uses::kMbarrier),
    make<Multicast<Mode::k2d>>("tma_multicast_2d", uses::kTmaMulticast),
    make<Multicast<Mode::k3d>>("tma_multicast_3d", uses::kTmaMulticast),
    make<Multicast<Mode::kIm2col>>("tma_multicast_im2col", uses::kTmaMulticast),
};

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm90a
