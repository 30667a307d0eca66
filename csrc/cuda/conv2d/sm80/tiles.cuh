// Tiles: how an operand's part lies in shared memory, and how threads bring it there from its source.
#pragma once

#include "cuda/ptx/sm80.cuh"

namespace fastconv::cuda::inline sm80 {

// kExtent x kDepth elements in shared memory, one of the two dimensions contiguous. Within a row the 16-byte chunks
// are permuted such that neither ldmatrix nor the fragment loads of float32 meet in a bank.
template <class T, int kExtent_, int kDepth_, bool kDepthContiguous_>
struct Tile {
  static constexpr int kExtent = kExtent_, kDepth = kDepth_;
  static constexpr bool kDepthContiguous = kDepthContiguous_;
  static constexpr int kRow = kDepthContiguous ? kDepth : kExtent;  // elements
  static constexpr int kRows = kDepthContiguous ? kExtent : kDepth;
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kBytes = kExtent * kDepth * sizeof(T);
  static_assert(kDepthContiguous ? kRow * sizeof(T) == 64 : kRow * sizeof(T) % 128 == 0);

  FASTCONV_DEVICE static int swizzle(int row) {
    if constexpr (kDepthContiguous) return row >> 1 & 3;
    return sizeof(T) == 2 ? row & 7 : (row & 3) << 1;
  }
  // Bytes from the start of the tile
  FASTCONV_DEVICE static int offset(int extent, int depth) {
    const int row = kDepthContiguous ? extent : depth, column = kDepthContiguous ? depth : extent;
    return (row * kRow + (column / kChunk ^ swizzle(row)) * kChunk + column % kChunk) * static_cast<int>(sizeof(T));
  }
};

// Brings one tile from where its source says into shared memory, kVector elements at a time.
//
// Asynchronously where that is possible. `kStaged` goes through registers: what `fetch` has read is masked and written
// by `put`, so that the arithmetic between the two hides the way to memory.
template <class T, class Source, class Tile, int kVector, int kThreads, bool kStaged, bool kMasked>
struct Loader {
  static constexpr int kRowVectors = Tile::kRow / kVector;
  static constexpr int kRowsAtOnce = kThreads / kRowVectors;
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % kRowVectors == 0 && Tile::kRows % kRowsAtOnce == 0 && (kStaged || !kMasked));
  using Vector = Vec<T, kVector>;

  const Source source;
  const Activation activation;
  const bool masked;
  const int row, column;
  typename Source::Extent extents[Tile::kDepthContiguous ? kPasses : 1];
  Vector held[kStaged ? kPasses : 1], held_output[kMasked ? kPasses : 1];

  FASTCONV_DEVICE Loader(const Source& s, int first, Activation a, bool has_mask)
      : source(s),
        activation(a),
        masked(has_mask),
        row(threadIdx.x / kRowVectors),
        column(threadIdx.x % kRowVectors * kVector) {
    if constexpr (Tile::kDepthContiguous) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) extents[i] = source.extent(first + row + i * kRowsAtOnce);
    } else {
      extents[0] = source.extent(first + column);
    }
  }

  // Starts to read the tile at this depth; `stage` is its place in shared memory.
  FASTCONV_DEVICE void fetch(unsigned char* stage, int depth) {
    if constexpr (Tile::kDepthContiguous) {
      const auto d = source.depth(depth + column);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) fetch(stage, i, source.address(extents[i], d), depth + column);
    } else {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int index = depth + row + i * kRowsAtOnce;
        fetch(stage, i, source.address(extents[0], source.depth(index)), index);
      }
    }
  }

  // Finishes what `fetch` has started; does nothing for asynchronous copies.
  FASTCONV_DEVICE void put(unsigned char* stage) {
    if constexpr (kStaged) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        Vector value = held[i];
        if constexpr (kMasked) {
          if (masked) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              if (!passes_gradient(to_float(held_output[i].v[v]), activation)) value.v[v] = from_float<T>(0.0f);
            }
          }
        }
        store(reinterpret_cast<T*>(stage + offset(i)), value);
      }
    }
  }

 private:
  FASTCONV_DEVICE int offset(int i) const {
    const int r = row + i * kRowsAtOnce;
    return Tile::kDepthContiguous ? Tile::offset(r, column) : Tile::offset(column, r);
  }
  FASTCONV_DEVICE void fetch(unsigned char* stage, int i, const T* element, int depth_index) {
    if constexpr (kStaged) {
      held[i] = element ? load<kVector>(element) : Vector{};
      if constexpr (kMasked) {
        if (masked) held_output[i] = element ? load<kVector>(source.mask(element, depth_index)) : Vector{};
      }
    } else {
      ptx::cp_async<kVector * sizeof(T)>(ptx::smem_address(stage) + offset(i), element ? element : source.anywhere(),
                                         element != nullptr);
    }
  }
};

}  // namespace fastconv::cuda::inline sm80
