// Sums, activations and their masks, elementwise:
//
//   add       y = activation(a + b), rounded once
//   mask      dx = dy where activation let y through, else 0
//   activate  y = activation(x)
//
//   flat     the tensors lie in memory alike. A thread owns kUnroll vectors of 16 bytes, a block's apart, so that a
//            warp's accesses are whole lines. vec1 does without alignment.
//   strided  the output is dense, the others have strides. A thread owns one element; where the innermost dimensions
//            differ, the caches make up for what the strides waste.
//
// Bound by memory: two reads and a write of each element.
#include "cuda/kernels/add_relu.h"
#include "cuda/kernels/scalar.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;

template <Elementwise kOperation, class T>
FASTCONV_DEVICE T apply(T a, T b, Activation activation) {
  if constexpr (kOperation == Elementwise::kAdd) {
    return narrow<T>(activate(widen(a) + widen(b), activation));
  } else if constexpr (kOperation == Elementwise::kMask) {
    return passes_gradient(widen(b), activation) ? a : narrow<T>(Compute<T>(0));
  } else {
    return narrow<T>(activate(widen(a), activation));
  }
}

template <Elementwise kOperation, class T, int kWidth>
FASTCONV_KERNEL(kThreads, 4)
elementwise_flat(const ElementwiseParams p) {
  const T* input = static_cast<const T*>(p.input);
  const T* other = static_cast<const T*>(p.other);
  T* output = static_cast<T*>(p.output);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = ((int64_t{blockIdx.x} * kUnroll + u) * kThreads + threadIdx.x) * kWidth;
    if (i + kWidth <= p.numel) {
      const Vec<T, kWidth> a = load<kWidth>(input + i);
      Vec<T, kWidth> b = a;
      if constexpr (kOperation != Elementwise::kActivate) b = load<kWidth>(other + i);
      Vec<T, kWidth> y;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y.v[j] = apply<kOperation>(a.v[j], b.v[j], p.activation);
      store(output + i, y);
    } else {
      for (int64_t j = i; j < p.numel; ++j) {
        const T b = kOperation == Elementwise::kActivate ? input[j] : other[j];
        output[j] = apply<kOperation>(input[j], b, p.activation);
      }
    }
  }
}

// Index: uint32_t where that counts the elements, as 64-bit divisions would take longer than the memory
template <Elementwise kOperation, class T, class Index>
FASTCONV_KERNEL(kThreads, 4)
elementwise_strided(const ElementwiseParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.numel) return;
  Index rest = static_cast<Index>(i);
  int64_t a = 0, b = 0;
#pragma unroll
  for (int d = kMaxElementwiseDims - 1; d >= 0; --d) {
    if (d >= p.dims) continue;
    const Index size = static_cast<Index>(p.sizes[d]);
    const Index quotient = rest / size;
    const int64_t at = rest - quotient * size;
    a += at * p.input_strides[d];
    b += at * p.other_strides[d];
    rest = quotient;
  }
  const T* input = static_cast<const T*>(p.input);
  const T* other = static_cast<const T*>(p.other);
  static_cast<T*>(p.output)[i] = apply<kOperation>(input[a], other[b], p.activation);
}

constexpr const char* kAligned = "tensors of one dense layout, 16-byte aligned";
constexpr const char* kFlat = "tensors of one dense layout";
constexpr const char* kStrided = "an output that is dense in some order of at most 6 dimensions";

KernelInfo entry(const char* op, const char* name, const char* needs) {
  return {name, op, 80, {0, 0, 0}, 0, kThreads, 0, needs};
}

constexpr const char* kOperationNames[] = {"add_relu_fprop", "activation_dgrad", "activation_fprop"};

template <Elementwise kOperation>
void launch_operation(const KernelInfo& info, bool strided, int width, const ElementwiseParams& params, Stream stream) {
  for_element_type(params.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const auto blocks = [&](int64_t each) { return dim3(static_cast<unsigned>(ceil_div(params.numel, each))); };
    if (strided) {
      if constexpr (kOperation != Elementwise::kActivate) {
        const auto kernel = params.numel <= INT32_MAX ? &elementwise_strided<kOperation, T, uint32_t>
                                                      : &elementwise_strided<kOperation, T, uint64_t>;
        launch(info, kernel, blocks(kThreads), dim3(kThreads), 0, stream, params);
      }
    } else if (width > 1) {
      launch(info, &elementwise_flat<kOperation, T, kVector<T>>, blocks(kThreads * kUnroll * kVector<T>),
             dim3(kThreads), 0, stream, params);
    } else {
      launch(info, &elementwise_flat<kOperation, T, 1>, blocks(kThreads * kUnroll), dim3(kThreads), 0, stream, params);
    }
  });
}

}  // namespace

const std::vector<KernelInfo>& add_relu_kernels() {
  static const std::vector<KernelInfo> kernels = {
      entry("add_relu_fprop", "add_relu_fprop_vec16", kAligned),
      entry("add_relu_fprop", "add_relu_fprop_vec1", kFlat),
      entry("add_relu_fprop", "add_relu_fprop_strided", kStrided),
      entry("activation_fprop", "activation_fprop_vec16", kAligned),
      entry("activation_fprop", "activation_fprop_vec1", kFlat),
      entry("activation_dgrad", "activation_dgrad_vec16", kAligned),
      entry("activation_dgrad", "activation_dgrad_vec1", kFlat),
      entry("activation_dgrad", "activation_dgrad_strided", kStrided),
  };
  return kernels;
}

void add_relu_launch(Elementwise operation, const ElementwiseParams& params, Stream stream) {
  const std::string op = kOperationNames[static_cast<int>(operation)];
  const bool strided = params.dims > 0;
  const bool aligned = is_aligned(params.input) && is_aligned(params.other) && is_aligned(params.output);
  const std::string vec16 = op + "_vec16", vec1 = op + "_vec1";
  std::string name = strided ? op + "_strided" : aligned ? vec16 : vec1;
  if (const char* forced = forced_kernel(op.c_str())) {
    const bool fits = forced == name || (forced == vec1 && !strided);
    if (!fits) {
      throw std::runtime_error(std::string("fastconv: kernel ") + forced + " was forced, but needs " +
                               find_kernel(add_relu_kernels(), forced).needs);
    }
    name = forced;
  }
  const KernelInfo& info = find_kernel(add_relu_kernels(), name.c_str());
  const int width = name == vec16 ? 16 / element_bytes(params.dtype) : 1;
  switch (operation) {
    case Elementwise::kAdd:
      return launch_operation<Elementwise::kAdd>(info, strided, width, params, stream);
    case Elementwise::kMask:
      return launch_operation<Elementwise::kMask>(info, strided, width, params, stream);
    case Elementwise::kActivate:
      return launch_operation<Elementwise::kActivate>(info, strided, width, params, stream);
  }
}

}  // namespace fastconv::cuda
