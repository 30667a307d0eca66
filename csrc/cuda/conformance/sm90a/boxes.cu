// The cases of boxes that are loaded and stored.
#include "cuda/conformance/sm90a/case.cuh"

namespace fastconv::cuda::inline sm90a {
namespace conformance {

// Has thread 0 load a box of so many words, writes it out as it lies.
template <int kWords, class Load>
FASTCONV_DEVICE void load_box(const Params& p, int thread, uint32_t* shared, Load load) {
  const uint32_t box = ptx::smem_address(shared), barrier = box + 4 * kWords;
  if (thread == 0) {
    ptx::tma_prefetch(p.map);
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(barrier, 4 * kWords);
    load(box, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = thread; i < kWords; i += 32) p.out[i] = shared[i];
}

// What TiledMap has, and the element at which the box begins. No arrays: nvcc cannot name them.
struct All {
  int c0, c1, c2 = 0;
};
struct Outer {
  int c1, c2;
};
struct Tiled {
  DType dtype;
  int rank;
  All size;
  Outer stride, box;
  All at;

  constexpr int rows() const { return box.c1 * box.c2; }
  constexpr int words() const { return ((size.c1 - 1) * stride.c1 + (size.c2 - 1) * stride.c2 + size.c0 + 1) / 2; }
  TensorMap map(const void* data) const {
    return tiled_map({data, dtype, rank, {size.c0, size.c1, size.c2}, {stride.c1, stride.c2}, {box.c1, box.c2}});
  }
};

template <Tiled kOf>
struct TmaLoad {
  static constexpr int kThreads = 32, kIn = kOf.words(), kOut = kOf.rows() * kRowWords, kSharedBytes = 4 * kOut + 8;
  static TensorMap map(const uint32_t* in, uint32_t*) { return kOf.map(in); }
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    load_box<kOut>(p, thread, shared, [&](uint32_t box, uint32_t barrier) {
      if constexpr (kOf.rank == 2) {
        ptx::tma_load_2d(box, p.map, barrier, kOf.at.c0, kOf.at.c1);
      } else {
        ptx::tma_load_3d(box, p.map, barrier, kOf.at.c0, kOf.at.c1, kOf.at.c2);
      }
    });
  }
};

// What lies outside of the box and of the tensor stays as it was, and so do some words past its end.
template <Tiled kOf>
struct TmaStore {
  static constexpr int kThreads = 32, kIn = kOf.rows() * kRowWords, kOut = kOf.words() + 8, kSharedBytes = 4 * kIn;
  static TensorMap map(const uint32_t*, uint32_t* out) { return kOf.map(out); }
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    for (int i = thread; i < kIn; i += 32) shared[i] = p.in[i];
    ptx::fence_proxy_async();
    __syncwarp();
    if (thread != 0) return;
    const uint32_t box = ptx::smem_address(shared);
    if constexpr (kOf.rank == 2) {
      ptx::tma_store_2d(p.map, box, kOf.at.c0, kOf.at.c1);
    } else {
      ptx::tma_store_3d(p.map, box, kOf.at.c0, kOf.at.c1, kOf.at.c2);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
};

// Boxes are written and stored in turns, in so many places, which are written again once they have been read.
template <int kPlaces>
struct StoringRounds {
  static constexpr int kThreads = 32, kRounds = 7, kBoxWords = 8 * kRowWords;
  static constexpr int kIn = kRounds * kBoxWords, kOut = kIn, kSharedBytes = 4 * kPlaces * kBoxWords;
  static TensorMap map(const uint32_t*, uint32_t* out) {
    return tiled_map({out, DType::kBFloat16, 2, {kBoxChannels, 8 * kRounds, 1}, {kBoxChannels, 0}, {8, 1}});
  }
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    for (int round = 0; round < kRounds; ++round) {
      uint32_t* const box = shared + round % kPlaces * kBoxWords;
      if (thread == 0) ptx::tma_store_wait_read<kPlaces - 1>();
      __syncwarp();
      for (int i = thread; i < kBoxWords; i += 32) box[swizzled(i)] = p.in[round * kBoxWords + i];
      ptx::fence_proxy_async();
      __syncwarp();
      if (thread == 0) {
        ptx::tma_store_2d(p.map, ptx::smem_address(box), 0, 8 * round);
        ptx::tma_store_commit();
      }
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
};

// What Im2colMap has, and where the box begins: a channel, a place of the walk, what lies between it and the pixel
struct Axes {
  int h, w;
};
struct Im2col {
  int n, h, w, c, stride_n, stride_h, stride_w;
  Axes first, step, count;
  int pixels, channel, image;
  Axes place, offset;

  constexpr int words() const { return ((n - 1) * stride_n + (h - 1) * stride_h + (w - 1) * stride_w + c + 1) / 2; }
};

template <Im2col kOf>
struct TmaLoadIm2col {
  static constexpr int kThreads = 32, kIn = kOf.words(), kOut = kOf.pixels * kRowWords, kSharedBytes = 4 * kOut + 8;
  static TensorMap map(const uint32_t* in, uint32_t*) {
    return im2col_map({in, DType::kFloat16, kOf.n, kOf.h, kOf.w, kOf.c, kOf.stride_n, kOf.stride_h, kOf.stride_w,
                       kOf.first.h, kOf.first.w, kOf.step.h, kOf.step.w, kOf.count.h, kOf.count.w, kOf.pixels});
  }
  static FASTCONV_DEVICE void run(const Params& p, int thread, uint32_t* shared) {
    load_box<kOut>(p, thread, shared, [&](uint32_t box, uint32_t barrier) {
      ptx::tma_load_im2col(box, p.map, barrier, kOf.channel, kOf.first.w + kOf.place.w * kOf.step.w,
                           kOf.first.h + kOf.place.h * kOf.step.h, kOf.image, kOf.offset.w, kOf.offset.h);
    });
  }
};

using enum DType;

template <Tiled kOf>
ConformanceCase load_case(const char* name) {
  return make<TmaLoad<kOf>>(name, uses::kTmaTiled);
}
const RegisterCases tiled_loads{
    load_case<Tiled{kFloat16, 2, {64, 16, 1}, {64, 0}, {8, 1}, {0, 3}}>("tma_load_2d"),
    load_case<Tiled{kBFloat16, 2, {70, 20, 1}, {88, 0}, {16, 1}, {64, 0}}>("tma_load_2d, 6 channels left"),
    load_case<Tiled{kFloat16, 2, {72, 20, 1}, {72, 0}, {16, 1}, {-24, -5}}>("tma_load_2d, before the first"),
    load_case<Tiled{kFloat16, 2, {72, 20, 1}, {80, 0}, {16, 1}, {32, 18}}>("tma_load_2d, past the last"),
    load_case<Tiled{kFloat16, 2, {64, 4, 1}, {64, 0}, {8, 1}, {0, 100}}>("tma_load_2d, outside"),
    load_case<Tiled{kFloat16, 3, {64, 5, 4}, {64, 320}, {3, 2}, {0, 1, 1}}>("tma_load_3d"),
    load_case<Tiled{kBFloat16, 3, {90, 5, 4}, {104, 624}, {4, 3}, {40, -1, 2}}>("tma_load_3d, edges"),
};

template <Tiled kOf>
ConformanceCase store_case(const char* name) {
  return make<TmaStore<kOf>>(name, uses::kTmaStore);
}
const RegisterCases stores{
    store_case<Tiled{kFloat16, 2, {72, 12, 1}, {80, 0}, {8, 1}, {0, 2}}>("tma_store_2d"),
    store_case<Tiled{kBFloat16, 2, {70, 12, 1}, {88, 0}, {16, 1}, {40, 5}}>("tma_store_2d, past the last"),
    store_case<Tiled{kFloat16, 2, {64, 8, 1}, {64, 0}, {8, 1}, {-16, -3}}>("tma_store_2d, before the first"),
    store_case<Tiled{kFloat16, 3, {64, 5, 3}, {64, 320}, {4, 2}, {0, 1, 1}}>("tma_store_3d"),
    store_case<Tiled{kFloat16, 3, {90, 5, 3}, {104, 624}, {4, 2}, {40, -2, 2}}>("tma_store_3d, edges"),
    make<StoringRounds<3>>("tma_store_wait_read", uses::kTmaStore),
    make<StoringRounds<1>>("fence_proxy_async", uses::kProxyFence),
};

template <Im2col kOf>
ConformanceCase im2col_case(const char* name) {
  return make<TmaLoadIm2col<kOf>>(name, uses::kTmaIm2col);
}
// Those whose names say so are other ones where corners, steps or offsets are taken rows first.
const RegisterCases im2col_loads{
    im2col_case<Im2col{2, 9, 7, 64, 4032, 448, 64, {-1, -1}, {1, 1}, {9, 7}, 72, 0, 0, {0, 0}, {0, 0}}>(
        "tma_load_im2col, 3x3"),
    im2col_case<Im2col{2, 9, 7, 64, 4032, 448, 64, {-1, -1}, {1, 1}, {9, 7}, 40, 0, 0, {3, 5}, {2, 2}}>(
        "tma_load_im2col, 3x3, from the middle"),
    im2col_case<Im2col{2, 9, 7, 40, 3024, 336, 48, {-1, -1}, {2, 2}, {5, 4}, 40, 0, 0, {2, 1}, {1, 2}}>(
        "tma_load_im2col, 3x3, stride 2, past the last image"),
    im2col_case<Im2col{3, 8, 8, 70, 4608, 576, 72, {-2, -2}, {1, 1}, {8, 8}, 24, 64, 1, {7, 3}, {4, 2}}>(
        "tma_load_im2col, 3x3, dilation 2, 6 channels left"),
    im2col_case<Im2col{2, 9, 7, 64, 4032, 448, 64, {-2, 0}, {1, 1}, {9, 7}, 32, 0, 0, {0, 0}, {1, 0}}>(
        "tma_load_im2col, 5x1: columns first"),
    im2col_case<Im2col{1, 13, 6, 40, 3120, 240, 40, {-2, 0}, {2, 1}, {7, 2}, 16, 0, 0, {1, 1}, {3, 2}}>(
        "tma_load_im2col, 5x3, stride 2x1, dilation 1x2: columns first"),
    im2col_case<Im2col{2, 8, 8, 16, 1024, 128, 16, {0, -3}, {1, 3}, {8, 3}, 32, 0, 0, {1, 0}, {0, 4}}>(
        "tma_load_im2col, 1x7, stride 1x3: columns first"),
    im2col_case<Im2col{2, 6, 10, 64, 3840, 640, 64, {1, -2}, {1, 1}, {4, 3}, 16, 0, 0, {3, 1}, {2, 1}}>(
        "tma_load_im2col, a part of each image: columns first"),
    im2col_case<Im2col{4, 1, 20, 96, 1920, 1920, 96, {0, 0}, {8, 8}, {1, 3}, 8, 32, 1, {0, 2}, {0, 3}}>(
        "tma_load_im2col, stride 8: columns first"),
    im2col_case<Im2col{2, 16, 16, 8, 2048, 128, 8, {-1, 0}, {1, 1}, {16, 16}, 256, 0, 0, {4, 9}, {1, 0}}>(
        "tma_load_im2col, 256 pixels: columns first"),
};

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm90a
