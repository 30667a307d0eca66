// Results: where a finished sum belongs, what happens to it on the way (bias, residual, activation, rounding), and
// where it waits when the depth is split.
#pragma once

#include "cuda/conv2d/sm80/sources.cuh"

namespace fastconv::cuda::inline sm80 {

// A run of neighbouring columns of C, 16 bytes of results, in whatever row: a thread finishes many rows of one run.
// What the columns decide, bias included, is found once.
template <Pass kPass, class T>
class Results {
 public:
  static constexpr int kRun = 16 / sizeof(T);
  using Vector = Vec<T, kRun>;

  FASTCONV_DEVICE Results(const ConvParams& params, int group, int first) : p(params) {
    int column = first;  // of the image or of the filter's gradient
    int branch = 0;
    int columns = p.extent_b;
    if constexpr (kPass == Pass::kFprop) {
      branch = branch_of(p, min(first, p.extent_b - 1));
      column -= p.first_filter[branch];
      columns = p.filters[branch];
    }
    count = columns - column;
    whole = p.wide[branch] && count >= kRun;
    if constexpr (kPass == Pass::kFprop) {
      const ConvBranch& of = p.arg.branch[branch];
      column += group * columns;
      strides = of.y;
      result = static_cast<T*>(of.output);
      residual = static_cast<const T*>(of.residual);
      activation = p.arg.activation;
      const T* const biases = static_cast<const T*>(of.bias);
#pragma unroll
      for (int i = 0; i < kRun; ++i) bias[i] = biases && i < count ? to_float(biases[column + i]) : 0.0f;
    } else if constexpr (kPass == Pass::kDgrad) {
      column += group * p.c_group;
      strides = p.arg.x;
      result = static_cast<T*>(p.arg.grad_input);
    } else {
      strides = {0, 1, 0, 0};
    }
    group_of_rows = group;
    offset = column * strides.c;
  }

  // Whether any column of the run exists; whether all do, and can be written at once
  FASTCONV_DEVICE bool exists() const { return count > 0; }
  FASTCONV_DEVICE bool is_whole() const { return whole; }

  // What is to be added to a row of a whole run, ahead of time
  FASTCONV_DEVICE void load_residual(int row, Vector& others) const {
    if constexpr (kPass == Pass::kFprop) {
      if (residual && whole && row < p.extent_a) others = load<kRun>(residual + place(row));
    }
  }

  // A row of a whole run
  FASTCONV_DEVICE void finish(int row, float (&sums)[kRun], const Vector& others) const {
    T* const to = address(row);
    if (to == nullptr) return;
    if constexpr (kPass == Pass::kFprop) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        sums[i] += bias[i];
        if (residual) sums[i] += to_float(others.v[i]);
        sums[i] = activate(sums[i], activation);
      }
    }
    Vector rounded;
#pragma unroll
    for (int i = 0; i < kRun; ++i) rounded.v[i] = from_float<T>(sums[i]);
    store(to, rounded);
  }

  // A row of any run, element by element
  FASTCONV_DEVICE void finish(int row, float (&sums)[kRun]) const {
    T* const to = address(row);
    if (to == nullptr) return;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i >= count) break;
      if constexpr (kPass == Pass::kFprop) {
        sums[i] += bias[i];
        if (residual) sums[i] += to_float(residual[place(row) + i * strides.c]);
        sums[i] = activate(sums[i], activation);
      }
      to[i * strides.c] = from_float<T>(sums[i]);
    }
  }

 private:
  // Of a row's first column of the run; null for a row that no branch has
  FASTCONV_DEVICE T* address(int row) const {
    if constexpr (kPass == Pass::kWgrad) {
      const int branch = branch_of(p, row), filter = row - p.first_filter[branch];
      const int filters = p.filters[branch];
      T* const weights = static_cast<T*>(p.arg.branch[branch].grad_weight);
      const int64_t first = (int64_t{group_of_rows} * filters + filter) * p.extent_b;
      return filter < filters ? weights + (first + offset) : nullptr;
    } else {
      return result + place(row);
    }
  }
  // The same within the tensor, of a pixel
  FASTCONV_DEVICE int64_t place(int pixel) const {
    const Pixel at = pixel_at(p.walk.by_pixels, p.walk.by_columns, pixel);
    const int row = p.rows.first_pixel + at.row * p.rows.step_pixel;
    const int column = p.columns.first_pixel + at.column * p.columns.step_pixel;
    return at.n * strides.n + row * strides.h + column * strides.w + offset;
  }

  const ConvParams& p;
  T* result = nullptr;
  const T* residual = nullptr;
  int64_t offset;
  Strides strides;
  Activation activation = Activation::kNone;
  int count, group_of_rows;
  bool whole;
  float bias[kRun];
};

// Where a part of a sum waits for the others, when the depth is split. A row is padded to whole runs.
FASTCONV_DEVICE float* part(const ConvParams& p, int split, int group, int a, int b) {
  const int64_t row = (int64_t{split} * p.arg.groups + group) * p.extent_a + a;
  return p.workspace + (row * p.pitch_b + b);
}

}  // namespace fastconv::cuda::inline sm80
