#include "cuda/conv2d/plan.h"

#include <algorithm>
#include <stdexcept>

namespace fastconv::cuda {
namespace {

constexpr int kFewestTilesDeep = 4;  // for a split to be worth its reduction
constexpr int kMostSplits = 64;

bool is_multiple(int64_t value, int divisor) { return value % divisor == 0; }
// Whether the channels of each pixel can be moved by `vector` elements at once.
bool has_vectors(const void* data, const Strides& strides, int channels, int vector) {
  return is_aligned(data) && strides.c == 1 && is_multiple(channels, vector) && is_multiple(strides.n, vector) &&
         is_multiple(strides.h, vector) && is_multiple(strides.w, vector);
}

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

// The GEMM's extents, the branches' places in it and the constants of its index arithmetic; what depends on the kernel
// is added before the launch.
ConvParams parameters(Pass pass, const ConvArguments& arg, const Phase& rows, const Phase& columns) {
  ConvParams p{};
  p.arg = arg;
  p.rows = rows, p.columns = columns;
  p.c_group = arg.c / arg.groups;
  const bool phased = pass == Pass::kDgrad;
  const int positions = phased ? rows.positions * columns.positions : arg.r * arg.s, pixels = arg.p * arg.q;
  int filters = 0;
  for (int i = 0; i < arg.branches; ++i) {
    p.k_group[i] = arg.branch[i].k / arg.groups;
    p.by_k[i] = Divider(p.k_group[i]);
    p.begin[i] = pass == Pass::kDgrad ? filters * positions : filters;
    filters += p.k_group[i];
  }
  p.begin[arg.branches] = pass == Pass::kDgrad ? filters * positions : filters;
  p.extent_a = pass == Pass::kFprop ? arg.n * pixels : phased ? arg.n * rows.pixels * columns.pixels : filters;
  p.extent_b = pass == Pass::kFprop ? filters : pass == Pass::kDgrad ? p.c_group : positions * p.c_group;
  p.depth = pass == Pass::kFprop ? positions * p.c_group : pass == Pass::kDgrad ? positions * filters : arg.n * pixels;
  p.by_q = Divider(arg.q), p.by_pixels = Divider(pixels);
  p.by_columns = Divider(columns.pixels), p.by_phase = Divider(rows.pixels * columns.pixels);
  p.by_s = Divider(std::max(phased ? columns.positions : arg.s, 1)), p.by_c = Divider(p.c_group);
  p.by_stride_h = Divider(arg.stride_h), p.by_stride_w = Divider(arg.stride_w);
  return p;
}

// One GEMM, or in dgrad one for each phase. The deepest comes first.
std::vector<ConvParams> parameters(Pass pass, const ConvArguments& arg) {
  std::vector<ConvParams> found;
  const int stride_h = pass == Pass::kDgrad ? arg.stride_h : 1, stride_w = pass == Pass::kDgrad ? arg.stride_w : 1;
  // A stride may be longer than the image.
  for (int h = 0; h < std::min(stride_h, arg.h); ++h) {
    const Phase rows = phase(h, stride_h, arg.pad_h, arg.dilation_h, arg.r, arg.h);
    for (int w = 0; w < std::min(stride_w, arg.w); ++w) {
      found.push_back(parameters(pass, arg, rows, phase(w, stride_w, arg.pad_w, arg.dilation_w, arg.s, arg.w)));
    }
  }
  std::sort(found.begin(), found.end(), [](const ConvParams& a, const ConvParams& b) { return a.depth > b.depth; });
  return found;
}

// Why the operands cannot be read by `vector` elements at once; null if they can.
const char* refuses_vectors(Pass pass, const ConvParams& p, int vector) {
  const ConvArguments& arg = p.arg;
  if (!is_multiple(p.c_group, vector)) return "a group's channels are not whole vectors of 16 bytes";
  if (pass != Pass::kDgrad && !has_vectors(arg.input, arg.x, arg.c, vector)) {
    return "the input's channels do not lie side by side, or are not aligned to 16 bytes";
  }
  for (int i = 0; i < arg.branches; ++i) {
    const ConvBranch& branch = arg.branch[i];
    if (pass != Pass::kWgrad && !is_aligned(branch.weight)) return "the weight is not aligned to 16 bytes";
    if (pass == Pass::kFprop) continue;
    if (!is_multiple(p.k_group[i], vector)) return "a group's filters are not whole vectors of 16 bytes";
    if (!has_vectors(branch.grad_output, branch.y, branch.k, vector) || !is_aligned(branch.output)) {
      return "the output's channels do not lie side by side, or are not aligned to 16 bytes";
    }
  }
  return nullptr;
}

// Whether the results of a branch can be written by `run` elements at once.
bool writes_wide(Pass pass, const ConvParams& p, int index, int run) {
  const ConvBranch& branch = p.arg.branch[index];
  switch (pass) {
    case Pass::kDgrad:
      return has_vectors(p.arg.grad_input, p.arg.x, p.c_group, run);
    case Pass::kWgrad:
      return is_aligned(branch.grad_weight) && is_multiple(p.extent_b, run);
    default:
      // A branch's last filters may be fewer than a run: they are written one by one.
      return has_vectors(branch.output, branch.y, run, run) && is_aligned(branch.residual) &&
             (p.arg.groups == 1 || is_multiple(p.k_group[index], run));
  }
}

int tiles_of(int extent, int tile) { return static_cast<int>(ceil_div(extent, tile)); }

ConvTiles count_tiles(Pass pass, const ConvParams& p, const KernelInfo& kernel) {
  const int tile_a = kernel.tile[0], tile_b = kernel.tile[1];
  ConvTiles tiles{};
  int shared = 0;
  for (int i = 0; i < p.arg.branches; ++i) {
    tiles.begin[i] = shared;
    shared += tiles_of(p.k_group[i], pass == Pass::kFprop ? tile_b : tile_a);
  }
  tiles.begin[p.arg.branches] = shared;
  tiles.along_b = pass == Pass::kFprop ? shared : tiles_of(p.extent_b, tile_b);
  tiles.all = tiles.along_b * (pass == Pass::kWgrad ? shared : tiles_of(p.extent_a, tile_a));
  return tiles;
}

LaunchShape shape_of(const ConvVariant& variant, const ConvParams& p, int tiles, int splits) {
  return {{static_cast<unsigned>(tiles), 1, static_cast<unsigned>(p.arg.groups * splits)},
          {static_cast<unsigned>(variant.info.threads)},
          variant.info.shared_bytes};
}

// What the launch of one GEMM needs beyond `parameters`.
ConvPlan::Launch launch_of(const ConvVariant& variant, const ConvParams& params, const ConvTiles& tiles, int splits) {
  ConvPlan::Launch found{params, {}, {}};
  ConvParams& p = found.params;
  std::copy(std::begin(tiles.begin), std::end(tiles.begin), p.tile_begin);
  p.tiles_b = tiles.along_b, p.by_tiles_b = Divider(tiles.along_b);
  p.splits = splits, p.by_splits = Divider(splits);
  const int tile_depth = variant.info.tile[2];
  p.split_depth = static_cast<int>(ceil_div(ceil_div(p.depth, tile_depth), splits)) * tile_depth;
  const int run = p.arg.dtype == DType::kFloat32 ? 4 : 8;
  for (int i = 0; i < p.arg.branches; ++i) p.wide[i] = writes_wide(variant.pass, p, i, run);
  found.shape = shape_of(variant, p, tiles.all, splits);
  const int64_t rows = int64_t{p.arg.groups} * p.extent_a;
  const int64_t elements = rows * p.extent_b + (variant.pass == Pass::kWgrad ? rows : 0);
  const int threads = variant.reduce_info->threads;
  found.reduction = {{static_cast<unsigned>(ceil_div(elements, threads))}, {static_cast<unsigned>(threads)}};
  return found;
}

}  // namespace

const char* ConvVariant::refusal(const ConvParams& p, const DeviceInfo&) const {
  if (p.arg.dtype != dtype) return "the tensors have another dtype";
  if (dtype == DType::kFloat32 && p.arg.tf32 != tf32) return tf32 ? "TF32 is not allowed" : "TF32 is allowed";
  if (pass != Pass::kFprop && p.arg.activation != Activation::kNone && !masked) return "there is an activation to undo";
  return vector > 1 ? refuses_vectors(pass, p, vector) : nullptr;
}

ConvCandidate ConvVariant::candidate(const ConvParams& p, const DeviceInfo& device) const {
  ConvCandidate found;
  found.tiles = count_tiles(pass, p, info);
  const int64_t tiles = found.tiles.all, blocks = tiles * p.arg.groups;
  const int64_t deep = ceil_div(p.depth, info.tile[2]);
  // wgrad is deep and has few tiles: it gets blocks for two rounds, which evens them out.
  const int64_t wanted = int64_t{device.multiprocessors} * (pass == Pass::kWgrad ? 2 : 1);
  const int64_t most = std::min({wanted / std::max<int64_t>(blocks, 1), deep / kFewestTilesDeep, int64_t{kMostSplits}});
  if (most > 1) found.splits = static_cast<int>(ceil_div(deep, ceil_div(deep, most)));
  found.cost.shape = shape_of(*this, p, static_cast<int>(tiles), found.splits);
  found.cost.rate = rate;
  const double work = static_cast<double>(tiles) * info.tile[0] * info.tile[1];
  found.cost.fill = static_cast<double>(p.extent_a) * p.extent_b / std::max(work, 1.0);
  return found;
}

ConvPlan plan_conv2d(Pass pass, const ConvArguments& arguments, const DeviceInfo& device) {
  const std::vector<ConvParams> gemms = parameters(pass, arguments);
  const auto [variant, candidate] = choose<ConvVariant>(static_cast<int>(pass), gemms[0], device);
  if (int64_t{arguments.groups} * candidate.splits > 65535) {
    throw std::runtime_error("fastconv: got " + std::to_string(arguments.groups) +
                             " groups, needed at most 65535 for the CUDA kernels");
  }
  ConvPlan plan;
  plan.variant = variant;
  for (const ConvParams& gemm : gemms) {
    const bool is_first = &gemm == &gemms[0];
    const ConvTiles tiles = is_first ? candidate.tiles : count_tiles(pass, gemm, variant->info);
    plan.launches.push_back(launch_of(*variant, gemm, tiles, candidate.splits));
    if (candidate.splits > 1) {
      const int64_t parts = candidate.splits * int64_t{arguments.groups} * gemm.extent_a * (gemm.extent_b + 1);
      plan.workspace = std::max(plan.workspace, parts);
    }
  }
  return plan;
}

void launch_conv2d(ConvPlan& plan, float* workspace, Stream stream) {
  for (auto& [params, shape, reduction] : plan.launches) {
    params.workspace = workspace;
    plan.variant->run(plan.variant->info, shape, params, stream);
    if (params.splits > 1) plan.variant->reduce(*plan.variant->reduce_info, reduction, params, stream);
  }
}

}  // namespace fastconv::cuda
