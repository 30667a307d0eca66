// Which kernel of conv2d.cuh runs, and with what parameters.
#include <algorithm>
#include <stdexcept>

#include "cuda/kernels/conv2d.cuh"

namespace fastconv::cuda {
namespace {

const std::vector<ConvVariant>& variants(Pass pass, DType dtype) {
  const auto of_dtype = [dtype]<Pass kPass>() -> const std::vector<ConvVariant>& {
    switch (dtype) {
      case DType::kFloat16:
        return conv_variants<kPass, DType::kFloat16>();
      case DType::kBFloat16:
        return conv_variants<kPass, DType::kBFloat16>();
      case DType::kFloat32:
        return conv_variants<kPass, DType::kFloat32>();
      default:
        throw std::runtime_error("fastconv: conv2d has no CUDA kernels for float64");
    }
  };
  switch (pass) {
    case Pass::kFprop:
      return of_dtype.template operator()<Pass::kFprop>();
    case Pass::kDgrad:
      return of_dtype.template operator()<Pass::kDgrad>();
    default:
      return of_dtype.template operator()<Pass::kWgrad>();
  }
}

void reduce(Pass pass, DType dtype, const KernelInfo& info, const ConvParams& params, dim3 grid, Stream stream) {
  const auto of_dtype = [&]<Pass kPass>() {
    switch (dtype) {
      case DType::kFloat16:
        return run_reduce<kPass, DType::kFloat16>(info, params, grid, stream);
      case DType::kBFloat16:
        return run_reduce<kPass, DType::kBFloat16>(info, params, grid, stream);
      default:
        return run_reduce<kPass, DType::kFloat32>(info, params, grid, stream);
    }
  };
  switch (pass) {
    case Pass::kFprop:
      return of_dtype.template operator()<Pass::kFprop>();
    case Pass::kDgrad:
      return of_dtype.template operator()<Pass::kDgrad>();
    default:
      return of_dtype.template operator()<Pass::kWgrad>();
  }
}

constexpr const char* kPassNames[] = {"conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad"};

KernelInfo reduce_info(Pass pass) {
  static constexpr const char* kNames[] = {"conv2d_fprop_reduce_sm80", "conv2d_dgrad_reduce_sm80",
                                           "conv2d_wgrad_reduce_sm80"};
  return {kNames[static_cast<int>(pass)], "conv2d_reduce", 80, {0, 0, 0}, 0, kReduceThreads, 0, "a split depth"};
}

bool is_multiple(int64_t value, int divisor) { return value % divisor == 0; }
bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
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

bool takes_vectors(Pass pass, const ConvParams& p, int vector) {
  const ConvArguments& arg = p.arg;
  if (!is_multiple(p.c_group, vector)) return false;
  if (pass != Pass::kDgrad && !has_vectors(arg.input, arg.x, arg.c, vector)) return false;
  for (int i = 0; i < arg.branches; ++i) {
    const ConvBranch& branch = arg.branch[i];
    if (pass != Pass::kWgrad && !is_aligned(branch.weight)) return false;
    if (pass != Pass::kFprop &&
        (!is_multiple(p.k_group[i], vector) || !has_vectors(branch.grad_output, branch.y, branch.k, vector) ||
         !is_aligned(branch.output))) {
      return false;
    }
  }
  return true;
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

int tile_count(Pass pass, const ConvParams& p, const ConvVariant& variant, int* tile_begin, int* tiles_b) {
  const auto tiles = [](int extent, int tile) { return static_cast<int>(ceil_div(extent, tile)); };
  const int tile_a = variant.info.tile[0], tile_b = variant.info.tile[1];
  int shared = 0;
  for (int i = 0; i < p.arg.branches; ++i) {
    tile_begin[i] = shared;
    shared += tiles(p.k_group[i], pass == Pass::kFprop ? tile_b : tile_a);
  }
  tile_begin[p.arg.branches] = shared;
  *tiles_b = pass == Pass::kFprop ? shared : tiles(p.extent_b, tile_b);
  return *tiles_b * (pass == Pass::kWgrad ? shared : tiles(p.extent_a, tile_a));
}

bool can_run(Pass pass, const ConvParams& p, const ConvVariant& variant) {
  const bool has_mask = pass != Pass::kFprop && p.arg.activation != Activation::kNone;
  return (variant.dtype != DType::kFloat32 || variant.tf32 == p.arg.tf32) && (variant.masked || !has_mask) &&
         (variant.vector == 1 || takes_vectors(pass, p, variant.vector));
}

const ConvVariant& find_variant(Pass pass, DType dtype, const KernelInfo& info) {
  for (const ConvVariant& variant : variants(pass, dtype)) {
    if (&variant.info == &info) return variant;
  }
  throw std::runtime_error(std::string("fastconv: ") + info.name + " is not a kernel for this call");
}

// The first variant that can run whose tiles fill the GPU; the last that can run, of the smallest tiles, if none does.
// Variants are listed from large tiles to small ones, vectors before gathering, unmasked before masked.
const ConvVariant& choose(Pass pass, const ConvParams& p, int multiprocessors) {
  const char* forced = forced_kernel(kPassNames[static_cast<int>(pass)]);
  const ConvVariant* best = nullptr;
  for (const ConvVariant& variant : variants(pass, p.arg.dtype)) {
    if (forced) {
      if (std::string(forced) != variant.info.name) continue;
      if (can_run(pass, p, variant)) return variant;
      throw std::runtime_error(std::string("fastconv: kernel ") + forced + " was forced and does not take this call; " +
                               "it needs " + variant.info.needs);
    }
    if (!can_run(pass, p, variant) || (best && best->vector > variant.vector)) continue;
    if (best && best->info.tile[0] == variant.info.tile[0]) continue;
    best = &variant;
    int tile_begin[kMaxBranches + 1], tiles_b;
    if (int64_t{tile_count(pass, p, variant, tile_begin, &tiles_b)} * p.arg.groups >= multiprocessors) break;
  }
  if (best) return *best;
  throw std::runtime_error(std::string("fastconv: kernel ") + (forced ? forced : "?") +
                           " was forced, for another dtype");
}

void launch_one(Pass pass, const ConvVariant& variant, ConvParams& p, int splits, float* workspace, Stream stream) {
  const int tiles = tile_count(pass, p, variant, p.tile_begin, &p.tiles_b);
  p.by_tiles_b = Divider(p.tiles_b);
  p.splits = splits, p.by_splits = Divider(splits), p.workspace = workspace;
  const int tile_depth = variant.info.tile[2];
  p.split_depth = static_cast<int>(ceil_div(ceil_div(p.depth, tile_depth), splits)) * tile_depth;
  const int run = p.arg.dtype == DType::kFloat32 ? 4 : 8;
  for (int i = 0; i < p.arg.branches; ++i) p.wide[i] = writes_wide(pass, p, i, run);
  variant.run(variant.info, p, dim3(tiles, 1, static_cast<unsigned>(p.arg.groups * splits)), stream);
  if (splits > 1) {
    const int64_t rows = int64_t{p.arg.groups} * p.extent_a;
    const int64_t elements = rows * p.extent_b + (pass == Pass::kWgrad ? rows : 0);
    const KernelInfo info = reduce_info(pass);
    reduce(pass, p.arg.dtype, info, p, dim3(static_cast<unsigned>(ceil_div(elements, kReduceThreads))), stream);
  }
}

constexpr int kFewestTilesDeep = 4;  // for a split to be worth its reduction
constexpr int kMostSplits = 64;

}  // namespace

ConvPlan plan_conv2d(Pass pass, const ConvArguments& arguments, int multiprocessors) {
  const std::vector<ConvParams> all = parameters(pass, arguments);
  const ConvParams& p = all[0];
  const ConvVariant& variant = choose(pass, p, multiprocessors);
  int tile_begin[kMaxBranches + 1], tiles_b;
  const int64_t blocks = int64_t{tile_count(pass, p, variant, tile_begin, &tiles_b)} * arguments.groups;
  const int64_t deep = ceil_div(p.depth, variant.info.tile[2]);
  ConvPlan plan;
  plan.kernel = &variant.info;
  // wgrad is deep and has few tiles: it gets blocks for two rounds, which evens them out.
  const int64_t wanted = pass == Pass::kWgrad ? 2 * multiprocessors : multiprocessors;
  const int64_t splits =
      std::min({wanted / std::max<int64_t>(blocks, 1), deep / kFewestTilesDeep, int64_t{kMostSplits}});
  if (splits > 1) {
    const int64_t each = ceil_div(deep, splits);
    plan.splits = static_cast<int>(ceil_div(deep, each));
    for (const ConvParams& one : all) {
      const int64_t parts = plan.splits * int64_t{arguments.groups} * one.extent_a * (one.extent_b + 1);
      plan.workspace = std::max(plan.workspace, parts);
    }
  }
  return plan;
}

void launch_conv2d(Pass pass, const ConvArguments& arguments, const ConvPlan& plan, float* workspace, Stream stream) {
  const ConvVariant& variant = find_variant(pass, arguments.dtype, *plan.kernel);
  const int64_t layers = int64_t{arguments.groups} * plan.splits;
  if (layers > 65535) {
    throw std::runtime_error("fastconv: got " + std::to_string(arguments.groups) +
                             " groups, needed at most 65535 for the CUDA kernels");
  }
  for (ConvParams& p : parameters(pass, arguments)) launch_one(pass, variant, p, plan.splits, workspace, stream);
}

const std::vector<KernelInfo>& conv2d_kernels() {
  static const std::vector<KernelInfo> all = [] {
    std::vector<KernelInfo> found;
    for (const Pass pass : {Pass::kFprop, Pass::kDgrad, Pass::kWgrad}) {
      for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
        for (const ConvVariant& variant : variants(pass, dtype)) found.push_back(variant.info);
      }
      found.push_back(reduce_info(pass));
    }
    return found;
  }();
  return all;
}

}  // namespace fastconv::cuda
