#include "cuda/conv2d/plan.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <limits>
#include <stdexcept>

namespace fastconv::cuda {
namespace {

constexpr int kFewestTilesDeep = 4;  // for a split to be worth its reduction
constexpr int64_t kMostSplits = 512;
constexpr int kPartsToSlice = 32;  // for one thread to have too many
constexpr int kMostRounds = 8;     // of blocks on a multiprocessor that a split aims at

// Estimates, in clocks: what a block does before its first and after its last product, in tiles of its depth; a second
// launch; bytes that the device moves meanwhile, to its memory or to the L2 cache
constexpr double kTilesAround = 4, kBoxesAround = 1.5, kLaunchClocks = 2500, kBytesOfMemory = 1100,
                 kBytesOfCache = 3000;

bool is_multiple(int64_t value, int divisor) { return value % divisor == 0; }
// Every stride-th pixel of one axis from this one on, and the filter's positions r that meet them.
Phase phase(int first_pixel, int stride, int padding, int dilation, int filter, int pixels) {
  Phase found{first_pixel, stride, static_cast<int>(ceil_div(pixels - first_pixel, stride)), 0, 1, 0};
  const int64_t index = (int64_t{first_pixel} + padding) % stride;
  for (int r = 0; r < filter; ++r) {
    if (int64_t{r} * dilation % stride != index) continue;
    if (found.positions == 0) found.first_position = r;
    if (found.positions == 1) found.step_position = r - found.first_position;
    ++found.positions;
  }
  return found;
}

// How dgrad's pixels of a phase meet those of the gradient: row p of the gradient saw row h of the input through
// position r where p * stride + r * dilation = h + padding. Exact divisions, as the phase has it.
struct Meeting {
  int first, step, tap;
};
Meeting meeting(const Phase& of, int stride, int padding, int dilation) {
  const int64_t first = int64_t{of.first_pixel} + padding - int64_t{of.first_position} * dilation;
  return {static_cast<int>(first / stride), of.step_pixel / stride,
          static_cast<int>(-(int64_t{of.step_position} * dilation / stride))};
}

const void* first_weight(const ConvArguments& arg) {
  const void* first = arg.branch[0].weight;
  for (int i = 1; i < arg.branches; ++i) first = std::min(first, arg.branch[i].weight, std::less<>{});
  return first;
}

// Results that are written at once
int run_of(const ConvParams& p) { return 16 / element_bytes(p.arg.dtype); }

// Whether the results of a branch can be written at once.
bool writes_wide(Pass pass, const ConvParams& p, int index) {
  const int run = run_of(p);
  const ConvBranch& branch = p.arg.branch[index];
  const int element = element_bytes(p.arg.dtype);
  switch (pass) {
    case Pass::kDgrad:
      return has_vectors(p.arg.grad_input, p.arg.x, p.c_group, run, element);
    case Pass::kWgrad:
      return is_aligned(branch.grad_weight) && is_multiple(p.extent_b, run);
    default:
      // A branch's last filters may be fewer than a run: they are written one by one.
      return has_vectors(branch.output, branch.y, run, run, element) && is_aligned(branch.residual) &&
             (p.arg.groups == 1 || is_multiple(p.k_group, run));
  }
}

// The GEMM's extents, the branches' places in it and the constants of its index arithmetic; what depends on the kernel
// is added before the launch.
ConvParams parameters(Pass pass, const ConvArguments& arg, const Phase& rows, const Phase& columns) {
  ConvParams p{};
  p.arg = arg;
  p.rows = rows, p.columns = columns;
  p.c_group = arg.c / arg.groups;
  for (int i = 0; i < arg.branches; ++i) {
    const int filters = arg.branch[i].k / arg.groups;
    const bool has_gap = pass == Pass::kFprop && i + 1 < arg.branches;
    p.first_filter[i + 1] = p.first_filter[i] + (has_gap ? branch_width(filters) : filters);
    p.filters[i] = filters;
  }
  p.k_group = pass == Pass::kFprop ? p.first_filter[arg.branches] : arg.grad_channels / arg.groups;
  if (pass != Pass::kFprop) p.first_filter[arg.branches] = p.k_group;
  const int positions = rows.positions * columns.positions;
  const int channels = pass == Pass::kDgrad ? p.k_group : p.c_group;  // of a position
  p.extent_a = pass == Pass::kFprop   ? arg.n * arg.p * arg.q
               : pass == Pass::kDgrad ? arg.n * rows.pixels * columns.pixels
                                      : p.k_group;
  p.extent_b = pass == Pass::kFprop ? p.k_group : pass == Pass::kDgrad ? p.c_group : positions * p.c_group;
  p.depth = pass == Pass::kWgrad ? arg.n * arg.p * arg.q : positions * channels;

  Walk& walk = p.walk;
  if (pass == Pass::kDgrad) {
    const Meeting h = meeting(rows, arg.stride_h, arg.pad_h, arg.dilation_h);
    const Meeting w = meeting(columns, arg.stride_w, arg.pad_w, arg.dilation_w);
    walk.data = arg.grad_output;
    walk.n = arg.y.n, walk.h = arg.y.h, walk.w = arg.y.w, walk.c = arg.y.c, walk.group = p.k_group * arg.y.c;
    walk.height = arg.p, walk.width = arg.q;
    walk.first_h = h.first, walk.step_h = h.step, walk.tap_h = h.tap;
    walk.first_w = w.first, walk.step_w = w.step, walk.tap_w = w.tap;
  } else {
    walk.data = arg.input;
    walk.n = arg.x.n, walk.h = arg.x.h, walk.w = arg.x.w, walk.c = arg.x.c, walk.group = p.c_group * arg.x.c;
    walk.height = arg.h, walk.width = arg.w;
    walk.first_h = -arg.pad_h, walk.step_h = arg.stride_h, walk.tap_h = arg.dilation_h;
    walk.first_w = -arg.pad_w, walk.step_w = arg.stride_w, walk.tap_w = arg.dilation_w;
  }
  walk.by_pixels = Divider(pass == Pass::kDgrad ? rows.pixels * columns.pixels : arg.p * arg.q);
  walk.by_columns = Divider(pass == Pass::kDgrad ? columns.pixels : arg.q);
  p.weights = first_weight(arg);
  bool all_wide = true;
  for (int i = 0; i < arg.branches; ++i) all_wide &= p.wide[i] = writes_wide(pass, p, i);
  // In wgrad a column belongs to all branches.
  if (pass == Pass::kWgrad) p.wide[0] = all_wide;
  p.by_s = Divider(std::max(columns.positions, 1)), p.by_channels = Divider(channels);
  return p;
}

// One GEMM, or in dgrad one for each phase. The deepest comes first.
std::vector<ConvParams> parameters(Pass pass, const ConvArguments& arg) {
  if (pass != Pass::kDgrad) {
    const Phase rows{0, 1, arg.p, 0, 1, arg.r}, columns{0, 1, arg.q, 0, 1, arg.s};
    return {parameters(pass, arg, rows, columns)};
  }
  std::vector<ConvParams> found;
  // A stride may be longer than the image.
  for (int h = 0; h < std::min(arg.stride_h, arg.h); ++h) {
    const Phase rows = phase(h, arg.stride_h, arg.pad_h, arg.dilation_h, arg.r, arg.h);
    for (int w = 0; w < std::min(arg.stride_w, arg.w); ++w) {
      found.push_back(parameters(pass, arg, rows, phase(w, arg.stride_w, arg.pad_w, arg.dilation_w, arg.s, arg.w)));
    }
  }
  std::sort(found.begin(), found.end(), [](const ConvParams& a, const ConvParams& b) { return a.depth > b.depth; });
  return found;
}

// Why the operands cannot be read by `vector` elements at once; null if they can.
const char* refuses_vectors(Pass pass, const ConvParams& p, int vector) {
  const ConvArguments& arg = p.arg;
  const int element = element_bytes(arg.dtype);
  if (!is_multiple(p.c_group, vector)) return "a group's channels are not whole vectors";
  if (pass != Pass::kDgrad && !has_vectors(arg.input, arg.x, arg.c, vector, element)) {
    return "the input's channels do not lie side by side, or are not aligned to vectors";
  }
  if (pass != Pass::kFprop) {
    if (!is_multiple(p.k_group, vector)) return "a group's filters are not whole vectors";
    if (!has_vectors(arg.grad_output, arg.y, arg.grad_channels, vector, element)) {
      return "the gradient's channels do not lie side by side, or are not aligned to vectors";
    }
  }
  if (pass != Pass::kWgrad) {
    for (int i = 0; i < arg.branches; ++i) {
      if (!is_aligned(arg.branch[i].weight, vector * element)) return "the weight is not aligned to vectors";
    }
    if (p.rows.positions > 15 || p.columns.positions > 16) return "the filter has more than 15 rows or 16 columns";
  }
  if (pass == Pass::kFprop) {
    for (int i = 0; i < arg.branches; ++i) {
      const int64_t begin = static_cast<const char*>(arg.branch[i].weight) - static_cast<const char*>(p.weights);
      const int64_t end = begin / element + int64_t{arg.branch[i].k} * p.depth;
      if (end / vector > std::numeric_limits<uint32_t>::max()) return "the weights lie too far apart";
    }
  }
  // What a kernel computes with, padding and places beyond the depth included, has 32 bits.
  const auto farthest = [&](const Strides& s, double rows, double columns) {
    return (static_cast<double>(arg.n) * s.n + rows * s.h + columns * s.w) / vector;
  };
  const double reach_h = arg.h + 2.0 * arg.pad_h + static_cast<double>(arg.r) * arg.dilation_h + arg.p;
  const double reach_w = arg.w + 2.0 * arg.pad_w + static_cast<double>(arg.s) * arg.dilation_w + arg.q;
  const bool is_far = (pass != Pass::kDgrad && farthest(arg.x, reach_h, reach_w) > std::numeric_limits<int>::max()) ||
                      (pass != Pass::kFprop && farthest(arg.y, reach_h, reach_w) > std::numeric_limits<int>::max());
  return is_far ? "the tensors have more than 2^31 vectors" : nullptr;
}

int tiles_of(int extent, int tile) { return static_cast<int>(ceil_div(extent, tile)); }

std::deque<ConvReduction>& reductions() {
  static auto& all = *new std::deque<ConvReduction>;
  return all;
}
const ConvReduction& reduction_of(const ConvVariant& variant) {
  const auto serves = [&](const ConvReduction& one) { return one.pass == variant.pass && one.dtype == variant.dtype; };
  return *std::find_if(reductions().begin(), reductions().end(), serves);
}

// Of a GEMM's extents what a kernel computes
struct Tiling {
  int64_t a, b;       // tiles along the extents of a group
  int64_t deep;       // and along the depth
  double multiplied;  // of the depth in tiles
  double fill;        // of what they compute, what is asked for

  int64_t tiles() const { return a * b; }
};
Tiling tiling(const ConvVariant& variant, const ConvParams& p) {
  const auto& [tile_a, tile_b, tile_depth] = variant.info.tile;
  int64_t a = p.extent_a, b = p.extent_b, depth = p.depth;
  double multiplied = 1;
  if (variant.boxes) {
    const BoxExtents boxes = box_extents(variant.pass, p, variant.halo);
    a = boxes.rows, b = boxes.b * kBox, depth = boxes.depth * kBox, multiplied = boxes.multiplied;
  }
  const int64_t tiles_a = ceil_div(a, tile_a * variant.cluster) * variant.cluster, tiles_b = ceil_div(b, tile_b);
  const double area = static_cast<double>(tiles_a * tile_a) * static_cast<double>(tiles_b * tile_b);
  const double of_depth = depth > 0 ? static_cast<double>(p.depth) / (static_cast<double>(depth) * multiplied) : 1;
  return {tiles_a, tiles_b, ceil_div(depth, tile_depth), multiplied,
          static_cast<double>(p.extent_a) * p.extent_b / std::max(area, 1.0) * of_depth};
}

LaunchShape shape_of(const ConvVariant& variant, const ConvParams& p, int64_t tiles, int splits) {
  return {{static_cast<unsigned>(tiles), 1, static_cast<unsigned>(p.arg.groups * splits)},
          {static_cast<unsigned>(variant.info.threads)},
          variant.info.shared_bytes};
}

int pitch_of(const ConvParams& p) { return static_cast<int>(ceil_div(p.extent_b, kBranchStep)) * kBranchStep; }

// Parts are written and read.
double clocks_of_reduction(const ConvParams& p, int64_t splits, const DeviceInfo& device) {
  const double parts = static_cast<double>(splits) * p.arg.groups * p.extent_a * pitch_of(p) * sizeof(float);
  return kLaunchClocks + 2 * parts / (2 * parts < device.l2_bytes ? kBytesOfCache : kBytesOfMemory);
}

// What the launch of one GEMM needs beyond `parameters`.
ConvLaunch launch_of(const ConvVariant& variant, const ConvParams& params, int splits, const DeviceInfo& device) {
  ConvLaunch found{params, {}, {}, {}, {}, splits > 1};
  ConvParams& p = found.params;
  const auto& [tile_a, tile_b, tile_depth] = variant.info.tile;
  const Tiling of_group = tiling(variant, p);
  const int tiles_b = tiles_of(p.extent_b, tile_b);
  p.by_tiles_b = Divider(tiles_b);
  p.splits = splits, p.by_splits = Divider(splits);
  p.split_depth = static_cast<int>(ceil_div(of_group.deep, splits)) * tile_depth;
  const int run = run_of(p);
  p.pitch_b = pitch_of(p);
  const int runs = tiles_of(p.extent_b, run);
  p.by_runs = Divider(runs), p.by_extent_a = Divider(p.extent_a);
  found.shape = shape_of(variant, p, of_group.tiles(), splits);
  if (variant.boxes) {
    const BoxTiles of{tile_a, tile_b, variant.cluster, variant.halo};
    found.boxes = box_params(variant.pass, p, of, device.multiprocessors);
    const int most = variant.halo ? found.boxes->work : std::max(device.multiprocessors / variant.cluster, 1);
    const int clusters = std::min(found.boxes->work, most);
    found.shape.grid = {static_cast<unsigned>(clusters * variant.cluster), 1, 1};
    found.shape.cluster = static_cast<unsigned>(variant.cluster);
  }
  if (variant.reads_photographs()) {
    const StemLaunch launch = stem_launch(variant.pass, p, variant.stem, device);
    found.stem = launch.params;
    found.shape = launch.shape;
    found.in_parts = variant.pass == Pass::kWgrad;
  }
  Walk& walk = p.walk;
  const int64_t first = walk.first_h * walk.h + walk.first_w * walk.w;
  if (walk.data) walk.data = static_cast<const char*>(walk.data) + first * element_bytes(p.arg.dtype);
  walk.n /= variant.vector, walk.h /= variant.vector, walk.w /= variant.vector;
  walk.tap_row = walk.tap_h * walk.h, walk.tap_column = walk.tap_w * walk.w;
  p.gradient = {p.arg.y.n / variant.vector, 1, p.arg.y.h / variant.vector, p.arg.y.w / variant.vector};
  p.reduce_slices = splits < kPartsToSlice ? 1 : kReduceSlices;
  const int64_t all = int64_t{p.arg.groups} * p.extent_a * runs * p.reduce_slices;
  found.reduction = {{static_cast<unsigned>(ceil_div(all, kReduceThreads))}, {kReduceThreads}};
  if (p.reduce_slices > 1) found.reduction.shared_bytes = kReduceThreads * run * static_cast<int64_t>(sizeof(float));
  return found;
}

}  // namespace

void register_reduction(const ConvReduction& reduction) {
  list_kernel(reductions().emplace_back(reduction).info, false);
}

bool has_vectors(const void* data, const Strides& strides, int64_t channels, int vector, int element) {
  return is_aligned(data, vector * element) && strides.c == 1 && is_multiple(channels, vector) &&
         is_multiple(strides.n, vector) && is_multiple(strides.h, vector) && is_multiple(strides.w, vector);
}

const char* ConvVariant::refusal(const ConvParams& p, const DeviceInfo& device) const {
  if (p.arg.dtype != dtype) return "the tensors have another dtype";
  if (dtype == DType::kFloat32 && p.arg.tf32 != tf32) return tf32 ? "TF32 is not allowed" : "TF32 is allowed";
  if (reads_photographs()) return refuses_stem(pass, p, stem, device);
  const char* const refused = vector > 1 ? refuses_vectors(pass, p, vector) : nullptr;
  return boxes && !refused ? refuses_boxes(pass, p, halo) : refused;
}

ConvCandidate ConvVariant::candidate(const ConvParams& p, const DeviceInfo& device) const {
  ConvCandidate found;
  found.cost.rate = rate;
  found.cost.resident = resident;
  if (reads_photographs()) {
    const StemLaunch launch = stem_launch(pass, p, stem, device);
    found.cost.shape = launch.shape;
    if (pass == Pass::kWgrad) found.splits = found.cost.splits = static_cast<int>(launch.shape.grid.x);
    const auto& [x, across, beside] = launch.shape.grid;
    const auto rounds =
        static_cast<double>(ceil_div(int64_t{launch.params.tiles} * across * beside, device.multiprocessors));
    const double added = pass == Pass::kWgrad ? clocks_of_reduction(p, found.splits, device) : 0;
    found.cost.rest = rounds * launch.products / (rounds * (launch.products + launch.moves) + added);
    // Blocks do one tile after the other.
    found.cost.shape.grid.x = static_cast<unsigned>(launch.params.tiles);
    found.cost.fill = launch.fill;
    return found;
  }
  const auto [tiles_a, tiles_b, deep, multiplied, fill] = tiling(*this, p);
  // Each block does a run of tiles, or one; or where there are boxes and no halo, one after the other.
  const int run = halo ? halo_run(pass, tiles_a, tiles_b, device.multiprocessors) : 1;
  const int64_t blocks_a = ceil_div(tiles_a, std::max(run, 1)), blocks = blocks_a * tiles_b * p.arg.groups;
  const double area = static_cast<double>(info.tile[0]) * info.tile[1];
  const double tile_clocks = area * multiplied * info.tile[2] /
                             (tf32                       ? 512
                              : dtype == DType::kFloat32 ? 64
                                                         : 1024) /
                             rate;

  // A multiprocessor shares itself among its blocks, so a launch takes as long as the one that has the most of them,
  // and longer where those are too few warps to hide what each waits for.
  const auto rounds = [&](int64_t splits) {
    return run * ceil_div(std::max<int64_t>(blocks, 1) * splits, device.multiprocessors);
  };
  const auto busy = [&](int64_t splits) {
    const double warps = static_cast<double>(std::min<int64_t>(rounds(splits), resident)) * info.threads / 32;
    return std::min(1.25 * warps / (warps + 2), 1.0);
  };
  const auto products = [&](int64_t splits) {
    return static_cast<double>(rounds(splits) * ceil_div(std::max<int64_t>(deep, 1), splits)) * tile_clocks;
  };
  const auto clocks = [&](int64_t splits) {
    const double around = static_cast<double>(rounds(splits)) * (boxes ? kBoxesAround : kTilesAround) * tile_clocks;
    return (products(splits) + around) / busy(splits) + (splits > 1 ? clocks_of_reduction(p, splits, device) : 0);
  };
  const int64_t most = halo && pass != Pass::kWgrad ? 1 : std::min(deep / kFewestTilesDeep, kMostSplits);
  double least = clocks(1);
  for (int round = 1; round <= kMostRounds; ++round) {
    const int64_t wanted = std::min(int64_t{device.multiprocessors} * round / std::max<int64_t>(blocks, 1), most);
    if (wanted < 2) continue;
    const int64_t splits = ceil_div(deep, ceil_div(deep, wanted));
    if (const double now = clocks(splits); now < least) {
      least = now;
      found.splits = static_cast<int>(splits);
    }
  }
  found.cost.shape = shape_of(*this, p, blocks_a * tiles_b, found.splits);
  found.cost.fill = fill * static_cast<double>(tiles_a) / std::max<double>(static_cast<double>(blocks_a) * run, 1);
  found.cost.splits = found.splits;
  found.cost.rest = products(found.splits) / least;
  found.cost.unproven = boxes;  // no GPU has run them yet
  return found;
}

void ConvChoice::prepared(const ConvArguments& arguments) { gemms = parameters(variant->pass, arguments); }

ConvChoice choose_conv2d(Pass pass, const ConvArguments& arguments, const DeviceInfo& device) {
  std::vector<ConvParams> gemms = parameters(pass, arguments);
  const auto [variant, candidate] = choose<ConvVariant>(static_cast<int>(pass), gemms[0], device);
  if (int64_t{arguments.groups} * candidate.splits > 65535) {
    throw std::runtime_error("fastconv: got " + std::to_string(arguments.groups) +
                             " groups, needed at most 65535 for the CUDA kernels");
  }
  return {variant, candidate, std::move(gemms)};
}

ConvPlan plan_conv2d(const ConvChoice& choice, const DeviceInfo& device) {
  const auto& [variant, candidate, gemms] = choice;
  ConvPlan plan;
  plan.variant = variant;
  plan.reduction = &reduction_of(*variant);
  for (const ConvParams& gemm : gemms) {
    // The other phases of a stride are less deep than the first, or empty.
    const int64_t deep = tiling(*variant, gemm).deep;
    int splits = candidate.splits;
    if (&gemm != &gemms[0]) splits = static_cast<int>(std::clamp<int64_t>(deep / kFewestTilesDeep, 1, splits));
    if (splits > 1 && !variant->reads_photographs()) {
      splits = static_cast<int>(ceil_div(deep, ceil_div(deep, splits)));
    }
    plan.launches.push_back(launch_of(*variant, gemm, splits, device));
    if (plan.launches.back().in_parts) {
      const int64_t parts = splits * int64_t{gemm.arg.groups} * gemm.extent_a * pitch_of(gemm);
      plan.workspace = std::max(plan.workspace, parts);
    }
  }
  return plan;
}

void launch_conv2d(ConvPlan& plan, float* workspace, Stream stream) {
  for (ConvLaunch& launch : plan.launches) {
    launch.params.workspace = workspace;
    if (launch.boxes) launch.boxes->workspace = workspace;
    if (launch.stem) launch.stem->workspace = workspace;
    plan.variant->run(plan.variant->info, launch, stream);
    if (launch.in_parts) plan.reduction->run(plan.reduction->info, launch, stream);
  }
}

}  // namespace fastconv::cuda
