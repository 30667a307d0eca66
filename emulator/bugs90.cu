// Kernels of sm_90a with one bug each, planted by a template parameter, as bugs.cu has them; test_emulator_sm90a.py
// runs them.
#include "cuda/conv2d/sm90a/turn.cuh"
#include "cuda/ptx/sm90a.cuh"
#include "cuda/runtime/launch.cuh"
#include "planted.h"

namespace fastconv::cuda {
namespace {

enum Bug {
  kNone,
  // ---- with boxes of rows
  kFullParity,
  kEmptyParity,
  kExpectsTooFew,
  kExpectsTooMany,
  kReleasesEarly,
  kNoWaitBeforeRelease,
  kNeverWaitsForEmpty,
  kNoInitFence,
  kNoBarrierAfterInit,
  kBarrierNotInitialised,
  kInitialisesAgain,
  kTooManyArrivals,
  kTwoThreadsLoad,
  kMisalignedBox,
  kBoxNeverWaitedFor,
  kReadsABoxUnderWay,
  kOneLaneWaits,
  kReadsBeforeWaiting,
  kDepthStep,
  kNoWgmmaFence,
  kNoCommit,
  kSumsReadEarly,
  kSumsTouched,
  kProductInHalfAWarpgroup,
  kDescriptorsDiffer,
  kNoFenceBeforeStore,
  kNoBarrierBeforeStore,
  kBothAtOneBarrier,
  kBarrierCountsDiffer,
  kStagingOverwritten,
  kStagingNotSwizzled,
  kLoadsOverAStore,
  kStoreNeverWaitedFor,
  kRegistersOfNobody,
  kRegistersInOneWarp,
  // ---- with boxes of columns
  kLeadingOffset,
  // ---- with boxes of an image
  kOffsetsExchanged,
  kStartOutside,
  // ---- with an operand that threads write
  kNoFenceBeforeProduct,
  kFenceAfterArrival,
  kBugs,
};

// ---- c[m, n] = sum of a[m, k] b[n, k] over k, + bias[n]: a warpgroup that loads, two that multiply

// Where the operands lie: with the depth side by side; with rows and columns side by side; a as the pixels of an image
// that 3x3 filters meet, padded by 1; b written by threads.
enum class Source { kRows, kColumns, kImage, kWritten };

constexpr Source source_of(int bug) {
  return bug < kLeadingOffset          ? Source::kRows
         : bug < kOffsetsExchanged     ? Source::kColumns
         : bug < kNoFenceBeforeProduct ? Source::kImage
                                       : Source::kWritten;
}

struct GemmParams {
  TensorMap a, b, c;
  const Half *b_data, *bias;
  int m, n, k;
  int tiles_n, tiles;
  int channels, rows, columns, step;  // of an image: its channels, its output's rows and columns
};

constexpr int kTileM = 128, kTileN = 128, kTileK = 64, kStages = 3, kConsumers = 2, kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr uint32_t kBoxBytes = 64 * 128;  // 64 rows
constexpr uint32_t kOperandBytes = 2 * kBoxBytes, kStageBytes = 2 * kOperandBytes;
constexpr uint32_t kStaging = kStages * kStageBytes;
constexpr uint32_t kBarriers = kStaging + kConsumers * 2 * kBoxBytes;
constexpr int kSharedBytes = 1024 + kBarriers + 8 * (2 * kStages + kConsumers);

using Turn = sm90a::Turn<kStages>;

struct Shared {
  unsigned char* memory;
  uint32_t base;
  FASTCONV_DEVICE Shared() {
    unsigned char* const all = dynamic_smem<unsigned char>();
    const uint32_t address = ptx::smem_address(all);
    base = (address + 1023) & ~1023u;
    memory = all + (base - address);
  }
  uint32_t stage(int stage) const { return base + stage * kStageBytes; }
  uint32_t staging(int consumer, int box) const { return base + kStaging + (2 * consumer + box) * kBoxBytes; }
  uint32_t full(int stage) const { return base + kBarriers + 8 * stage; }
  uint32_t empty(int stage) const { return full(kStages + stage); }
  uint32_t residual(int consumer) const { return full(2 * kStages + consumer); }
  const Half* at(uint32_t address) const { return reinterpret_cast<const Half*>(memory + (address - base)); }
};

// 16-byte chunk of a row of a box
FASTCONV_DEVICE uint32_t at_chunk(int row, int chunk) { return row * 128 + ((chunk ^ row % 8) << 4); }

FASTCONV_DEVICE int steps_of(Source source, const GemmParams& p) {
  return source == Source::kImage ? 9 * ((p.channels + kTileK - 1) / kTileK) : (p.k + kTileK - 1) / kTileK;
}

template <int kBug, Source kSource>
FASTCONV_DEVICE void load_stage(const GemmParams& p, uint32_t stage, uint32_t full, int m0, int n0, int step) {
  const uint32_t b = stage + kOperandBytes;
  const int k = step * kTileK;
  if constexpr (kSource == Source::kRows || kSource == Source::kWritten) {
    ptx::tma_load_2d(stage + (kBug == kMisalignedBox ? 128 : 0), p.a, full, k, m0);
    if (kSource == Source::kRows) ptx::tma_load_2d(b, p.b, full, k, n0);
  } else if constexpr (kSource == Source::kColumns) {
    for (int i = 0; i < 2; ++i) {
      ptx::tma_load_2d(stage + i * kBoxBytes, p.a, full, m0 + 64 * i, k);
      ptx::tma_load_2d(b + i * kBoxBytes, p.b, full, n0 + 64 * i, k);
    }
  } else {
    const int boxes = (p.channels + kTileK - 1) / kTileK, tap = step / boxes, c = step % boxes * kTileK;
    const int pixel = m0 % (p.rows * p.columns), image = m0 / (p.rows * p.columns);
    const int h = pixel / p.columns * p.step - 1, w = pixel % p.columns * p.step - 1;
    const int tap_h = tap / 3, tap_w = tap % 3;
    ptx::tma_load_im2col(stage, p.a, full, c, w, h - (kBug == kStartOutside), image,
                         kBug == kOffsetsExchanged ? tap_h : tap_w, kBug == kOffsetsExchanged ? tap_w : tap_h);
    ptx::tma_load_3d(b, p.b, full, c, tap, n0);
  }
}

// A thread's part of b's tile: a row, one half by stores and one by copies
FASTCONV_DEVICE void write_row(const GemmParams& p, const Shared& shared, uint32_t b, int n0, int step) {
  const int row = static_cast<int>(threadIdx.x);
  for (int chunk = 0; chunk < 8; ++chunk) {
    const int k = step * kTileK + chunk * 8;
    const bool exists = n0 + row < p.n && k < p.k;
    const Half* const from = exists ? p.b_data + (n0 + row) * p.k + k : p.b_data;
    const uint32_t to = b + at_chunk(row, chunk);
    if (chunk < 4) {
      store(const_cast<Half*>(shared.at(to)), exists ? load<8>(from) : Vec<Half, 8>{});
    } else {
      ptx::cp_async<16>(to, from, exists);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

template <int kBug, Source kSource>
FASTCONV_DEVICE void produce(const GemmParams& p, const Shared& shared) {
  constexpr uint32_t kBytes = kSource == Source::kWritten ? kOperandBytes : kStageBytes;
  constexpr uint32_t kExpected =
      kBytes + (kBug == kExpectsTooMany ? 128 : 0) - (kBug == kExpectsTooFew ? kBoxBytes : 0);
  const int thread = threadIdx.x;
  Turn turn;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int m0 = tile / p.tiles_n * kTileM, n0 = tile % p.tiles_n * kTileN;
    for (int step = 0; step < steps_of(kSource, p); ++step) {
      const uint32_t stage = shared.stage(turn.stage), full = shared.full(turn.stage);
      if (kBug != kNeverWaitsForEmpty) {
        ptx::mbarrier_wait(shared.empty(turn.stage), kBug == kEmptyParity ? turn.parity : turn.parity ^ 1);
      }
      if (thread == 0) {
        ptx::mbarrier_arrive_expect(full, kExpected);
        load_stage<kBug, kSource>(p, stage, full, m0, n0, step);
        if (kBug == kReadsABoxUnderWay) load<8>(shared.at(stage));
        if (kBug == kInitialisesAgain && step == 1) ptx::mbarrier_init(full, 1);
      } else if (kBug == kTwoThreadsLoad) {
        load_stage<kBug, kSource>(p, stage, full, m0, n0, step);
      }
      if (kSource == Source::kWritten) {
        write_row(p, shared, stage + kOperandBytes, n0, step);
        if (kBug != kNoFenceBeforeProduct && kBug != kFenceAfterArrival) ptx::fence_proxy_async();
        ptx::mbarrier_arrive(full);
        if (kBug == kFenceAfterArrival) ptx::fence_proxy_async();
      }
      turn.advance();
    }
  }
  if (kBug == kBoxNeverWaitedFor) {
    ptx::mbarrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
    ptx::mbarrier_arrive_expect(shared.full(turn.stage), kBytes);
    load_stage<kBug, kSource>(p, shared.stage(turn.stage), shared.full(turn.stage), 0, 0, 0);
  }
}

template <int kBug, Source kSource>
FASTCONV_DEVICE void multiply(const GemmParams& p, const Shared& shared, int consumer, Turn& turn,
                              float (&sums)[kTileN / 2]) {
  constexpr ptx::Major kMajor = kSource == Source::kColumns ? ptx::Major::kExtent : ptx::Major::kDepth;
  constexpr uint32_t kStep = kSource == Source::kColumns ? 2048 : kBug == kDepthStep ? 16 : 32;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4;
  const auto release = [&](int stage) {
    if (lane == 0 || kBug == kTooManyArrivals) ptx::mbarrier_arrive(shared.empty(stage));
  };
  int before = -1;
  for (int step = 0; step < steps_of(kSource, p); ++step) {
    if (kBug == kReadsBeforeWaiting && thread % kWarpgroup == 96) load<8>(shared.at(shared.stage(turn.stage)));
    if (kBug != kOneLaneWaits || lane == 0) {
      ptx::mbarrier_wait(shared.full(turn.stage), kBug == kFullParity ? turn.parity ^ 1 : turn.parity);
    }
    const uint32_t stage = shared.stage(turn.stage);
    const uint64_t a = ptx::wgmma_operand<kMajor>(stage + consumer * kBoxBytes, kBoxBytes);
    uint64_t b = ptx::wgmma_operand<kMajor>(stage + kOperandBytes, kBug == kLeadingOffset ? kBoxBytes / 2 : kBoxBytes);
    if (kBug == kDescriptorsDiffer && lane == 3) b += 2;
    if (kBug != kNoWgmmaFence) ptx::wgmma_fence();
    for (uint32_t i = 0; i < kTileK / 16; ++i) {
      if (kBug == kProductInHalfAWarpgroup && warp < 2) continue;
      ptx::wgmma<Half, kMajor, kMajor>(sums, a + i * kStep / 16, b + i * kStep / 16, step > 0 || i > 0);
    }
    if (kBug == kSumsTouched && lane == 0) sums[0] = 0.0f;
    if (kBug != kNoCommit) ptx::wgmma_commit();
    if (kBug == kReleasesEarly) release(turn.stage);
    if (kBug != kNoWaitBeforeRelease) ptx::wgmma_wait<1>();
    if (before >= 0 && kBug != kReleasesEarly) release(before);
    before = turn.stage;
    turn.advance();
  }
  if (kBug != kSumsReadEarly) ptx::wgmma_wait<0>();
  if (kBug != kReleasesEarly) release(before);
}

template <int kBug>
FASTCONV_DEVICE void finish(const GemmParams& p, const Shared& shared, int consumer, int tile, int index,
                            const float (&sums)[kTileN / 2]) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32, warp = thread / 32;
  const int m0 = tile / p.tiles_n * kTileM + consumer * 64, n0 = tile % p.tiles_n * kTileN;
  const int barrier = kBug == kBothAtOneBarrier ? 1 : 1 + consumer;
  const int together = kBug == kBarrierCountsDiffer && warp == 1 ? 96 : kWarpgroup;
  if (thread == 0 && kBug != kStagingOverwritten) ptx::tma_store_wait_read<0>();
  ptx::named_barrier_sync(barrier, together);
  for (int i = 0; i < kTileN / 2; i += 8) {
    uint32_t pairs[4];
    for (int e = 0; e < 4; ++e) {
      const int column = n0 + 2 * i + 8 * (e / 2) + lane % 4 * 2;
      float pair[2];
      for (int j = 0; j < 2; ++j) {
        pair[j] = sums[i + 2 * e + j] + (column + j < p.n ? to_float(p.bias[column + j]) : 0.0f);
      }
      pairs[e] = pack2<Half>(pair[0], pair[1]);
    }
    const int row = 16 * warp + lane % 16, chunk = i / 4 + lane / 16;
    const uint32_t at = kBug == kStagingNotSwizzled ? row * 128 + chunk % 8 * 16 : at_chunk(row, chunk % 8);
    ptx::stmatrix_x4(shared.staging(consumer, chunk / 8) + at, pairs);
  }
  if (kBug != kNoFenceBeforeStore) ptx::fence_proxy_async();
  if (kBug != kNoBarrierBeforeStore) ptx::named_barrier_sync(barrier, together);
  if (thread != 0) return;
  for (int box = 0; box < 2; ++box) ptx::tma_store_2d(p.c, shared.staging(consumer, box), n0 + 64 * box, m0);
  ptx::tma_store_commit();
  if (kBug == kLoadsOverAStore) {
    ptx::mbarrier_arrive_expect(shared.residual(consumer), kBoxBytes);
    ptx::tma_load_2d(shared.staging(consumer, 0), p.c, shared.residual(consumer), n0, m0);
    ptx::mbarrier_wait(shared.residual(consumer), index % 2);
  }
}

template <int kBug, Source kSource>
FASTCONV_KERNEL(kThreads, 1)
gemm(const __grid_constant__ GemmParams p) {
  const Shared shared;
  const int thread = threadIdx.x, warpgroup = thread / kWarpgroup;
  if (thread == 0) {
    ptx::tma_prefetch(p.a);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), kSource == Source::kWritten ? 1 + kWarpgroup : 1);
      if (kBug != kBarrierNotInitialised || stage < 2) ptx::mbarrier_init(shared.empty(stage), kConsumers * 4);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) ptx::mbarrier_init(shared.residual(consumer), 1);
    if (kBug != kNoInitFence) ptx::mbarrier_init_fence();
  }
  if (kBug != kNoBarrierAfterInit) __syncthreads();
  if (warpgroup == 0) {
    if (kBug != kRegistersOfNobody && (kBug != kRegistersInOneWarp || thread < 32)) ptx::registers_decrease<40>();
    if (thread == 0 || kSource == Source::kWritten || (kBug == kTwoThreadsLoad && thread == 32)) {
      produce<kBug, kSource>(p, shared);
    }
    return;
  }
  ptx::registers_increase<232>();
  const int consumer = warpgroup - 1;
  Turn turn;
  for (int tile = blockIdx.x, index = 0; tile < p.tiles; tile += gridDim.x, ++index) {
    float sums[kTileN / 2];
    multiply<kBug, kSource>(p, shared, consumer, turn, sums);
    finish<kBug>(p, shared, consumer, tile, index, sums);
    if (kBug == kSumsReadEarly) ptx::wgmma_wait<0>();
  }
  if (thread % kWarpgroup == 0 && kBug != kStoreNeverWaitedFor) ptx::tma_store_wait_read<0>();
}

// ---- running it

TensorMap matrix(const void* data, int64_t inner, int64_t outer, int64_t pitch, int box) {
  TiledMap map;
  map.data = data;
  map.size[0] = inner;
  map.size[1] = outer;
  map.stride[0] = pitch;
  map.box[0] = box;
  return tiled_map(map);
}

template <int kBug, Source kSource>
void run(const GemmParams& p) {
  static const KernelInfo info{"gemm90",     "bugs90", {90, true},    {kTileM, kTileN, kTileK}, kStages, kThreads,
                               kSharedBytes, "",       uses::kNothing};
  launch(info, &gemm<kBug, kSource>, {{2}, {kThreads}, kSharedBytes}, nullptr, p);
}

template <int... kBug>
void dispatch(int bug, Source source, const GemmParams& p, std::integer_sequence<int, kBug...>) {
  if (bug == kNone) {
    if (source == Source::kRows) run<kNone, Source::kRows>(p);
    if (source == Source::kColumns) run<kNone, Source::kColumns>(p);
    if (source == Source::kImage) run<kNone, Source::kImage>(p);
    if (source == Source::kWritten) run<kNone, Source::kWritten>(p);
    return;
  }
  ((bug == kBug + 1 ? run<kBug + 1, source_of(kBug + 1)>(p) : void()), ...);
}

}  // namespace
}  // namespace fastconv::cuda

using namespace fastconv::cuda;

// What the emulator says; "" when it has nothing to say. c's rows are `pitch` elements apart and hold n. Of
// Source::kImage a is [images, height, width, channels], b [n, 3, 3, channels], and c's rows are the pixels of the
// output.
struct Shape {
  int m, n, k, pitch;
  int images, height, width, channels, step;
};
API const char* run_gemm(int bug, int source, const void* a, const void* b, const void* bias, void* c,
                         const Shape* shape) {
  return attempt([&] {
    const auto [m, n, k, pitch, images, height, width, channels, step] = *shape;
    const Source from = static_cast<Source>(source);
    GemmParams p{};
    p.b_data = static_cast<const Half*>(b);
    p.bias = static_cast<const Half*>(bias);
    p.n = n, p.k = k, p.m = m;
    int64_t a_elements = int64_t{m} * k, b_elements = int64_t{n} * k;
    if (from == Source::kImage) {
      p.channels = channels, p.step = step;
      p.rows = (height - 1) / step + 1, p.columns = (width - 1) / step + 1;
      p.m = images * p.rows * p.columns;
      a_elements = int64_t{images} * height * width * channels, b_elements = int64_t{n} * 9 * channels;
      Im2colMap map;
      map.data = a;
      map.n = images, map.h = height, map.w = width, map.c = channels;
      map.stride_w = channels, map.stride_h = int64_t{width} * channels, map.stride_n = map.stride_h * height;
      map.first_h = map.first_w = -1;
      map.step_h = map.step_w = step;
      map.count_h = p.rows, map.count_w = p.columns;
      map.pixels = kTileM;
      p.a = im2col_map(map);
      TiledMap filters;
      filters.data = b;
      filters.rank = 3;
      filters.size[0] = channels, filters.size[1] = 9, filters.size[2] = n;
      filters.stride[0] = channels, filters.stride[1] = 9 * channels;
      filters.box[0] = 1, filters.box[1] = kTileN;
      p.b = tiled_map(filters);
    } else if (from == Source::kColumns) {
      p.a = matrix(a, m, k, m, kTileK);
      p.b = matrix(b, n, k, n, kTileK);
    } else {
      p.a = matrix(a, k, m, k, kTileM);
      p.b = matrix(b, k, n, k, kTileN);
    }
    p.c = matrix(c, n, p.m, pitch, 64);
    p.tiles_n = static_cast<int>(ceil_div(n, kTileN));
    p.tiles = static_cast<int>(ceil_div(p.m, kTileM)) * p.tiles_n;
    name("a", a, a_elements * 2, false);
    name("b", b, b_elements * 2, false);
    name("bias", bias, int64_t{n} * 2, false);
    name("c", c, (int64_t{p.m - 1} * pitch + n) * 2, true, int64_t{n} * 2, int64_t{pitch} * 2);
    dispatch(bug, from, p, std::make_integer_sequence<int, kBugs - 1>());
  });
}
