// Tiles: how an operand's part lies in shared memory, and how threads bring it there from its source.
#pragma once

#include "cuda/ptx/sm80.cuh"

namespace fastconv::cuda::inline sm80 {

// kExtent x kDepth elements in shared memory, one of the two dimensions contiguous. Within a row the 16-byte chunks
// are permuted such that neither ldmatrix nor the fragment loads of float32 meet in a bank. Rows of an extent that is
// no power of two are padded to an odd number of chunks instead, which does the same for ldmatrix.
template <class T, int kExtent_, int kDepth_, bool kDepthContiguous_>
struct Tile {
  static constexpr int kExtent = kExtent_, kDepth = kDepth_;
  static constexpr bool kDepthContiguous = kDepthContiguous_;
  static constexpr int kRow = kDepthContiguous ? kDepth : kExtent;  // elements
  static constexpr int kRows = kDepthContiguous ? kExtent : kDepth;
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr bool kPadded = (kRow & (kRow - 1)) != 0;
  static constexpr int kRowBytes = (kPadded ? (kRow / kChunk | 1) * kChunk : kRow) * static_cast<int>(sizeof(T));
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRow % kChunk == 0 && kBytes % 128 == 0);
  static_assert(kPadded ? sizeof(T) == 2 && !kDepthContiguous
                        : kRowBytes == 64 || (!kDepthContiguous && kRowBytes % 128 == 0));
  // The bits of an offset that the permutation reaches
  static constexpr uint32_t kPermuted = kPadded ? 0 : kRowBytes == 64 ? 63 : 127;

  FASTCONV_DEVICE static int swizzle(int row) {
    if constexpr (kPadded) return 0;
    if constexpr (kRowBytes == 64) return row >> 1 & 3;
    return sizeof(T) == 2 ? row & 7 : (row & 3) << 1;
  }
  // Bytes from the start of the tile
  FASTCONV_DEVICE static int offset(int extent, int depth) {
    const int row = kDepthContiguous ? extent : depth, column = kDepthContiguous ? depth : extent;
    const int within = (column / kChunk ^ swizzle(row)) * kChunk + column % kChunk;
    return row * kRowBytes + within * static_cast<int>(sizeof(T));
  }
  // Where (extent + blocks, depth + deeper) is, from an `offset` to which multiples of 128 bytes may have been added.
  // Both are constants, so that an exclusive or is all it takes; `blocks` is a multiple of 8, and neither sum carries.
  FASTCONV_DEVICE static uint32_t moved(uint32_t offset, int blocks, int deeper) {
    if constexpr (kDepthContiguous) {
      return (offset ^ static_cast<uint32_t>(deeper * sizeof(T))) + static_cast<uint32_t>(blocks * kRowBytes);
    } else {
      const uint32_t bytes = static_cast<uint32_t>(blocks * sizeof(T));
      return (offset ^ (bytes & kPermuted) ^ static_cast<uint32_t>(swizzle(deeper) * 16)) + (bytes & ~kPermuted) +
             static_cast<uint32_t>(deeper * kRowBytes);
    }
  }
};

// The most rows that threads bring at once, a vector each: a power of two that divides the tile's rows.
constexpr int rows_at_once(int rows, int threads_of_row, int threads) {
  int found = 1;
  while (found * 2 * threads_of_row <= threads && rows % (found * 2) == 0) found *= 2;
  return found;
}

// Which vectors of a tile's rows a thread brings: one column, and every kRowsAtOnce-th row. Threads beyond those that a
// row's vectors need have no part.
template <class T, class Tile, int kVector, int kThreads>
struct Share {
  static constexpr int kRowVectors = Tile::kRow / kVector;
  static constexpr int kRowsAtOnce = rows_at_once(Tile::kRows, kRowVectors, kThreads);
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static constexpr bool kAll = kRowVectors * kRowsAtOnce == kThreads;

  const int row = static_cast<int>(threadIdx.x) / kRowVectors;
  const int column = static_cast<int>(threadIdx.x) % kRowVectors * kVector;

  // Copies this thread's i-th vector into the tile; zeros where it does not `exist`.
  FASTCONV_DEVICE void copy(unsigned char* tile, int i, const T* source, bool exists) const {
    if (!kAll && row >= kRowsAtOnce) return;
    // The permutation, if there is one, repeats after 8 rows.
    constexpr bool kRepeats = Tile::kPadded || kRowsAtOnce % 8 == 0;
    const int r = kRepeats ? row : row + i * kRowsAtOnce;
    unsigned char* const to = tile + (Tile::kDepthContiguous ? Tile::offset(r, column) : Tile::offset(column, r)) +
                              (kRepeats ? i * kRowsAtOnce * Tile::kRowBytes : 0);
    if constexpr (kVector * sizeof(T) >= 4) {
      ptx::cp_async<kVector * sizeof(T)>(ptx::smem_address(to), source, exists);
    } else {
      Vec<T, kVector> value;
      value.v[0] = from_float<T>(0.0f);
      if (exists) value = load<kVector>(source);
      store(reinterpret_cast<T*>(to), value);
    }
  }
};

}  // namespace fastconv::cuda::inline sm80
