// Operand tiles in shared memory.
#pragma once

#include "pipeline.cuh"

namespace lorasb {

// A tile of an operand with OUTER indices and K contraction indices, laid out as in global
// memory: rows along K when K is the contiguous dimension, along OUTER otherwise.
//
// The 16-byte chunks of a row are permuted so that eight rows at one column touch all 32 banks:
// `ldmatrix`, which reads such columns, has no bank conflicts and needs no padding.
//
// An fp32 tile along OUTER is read in rows and needs no permutation.
template <typename T_, int OUTER_, int K_, bool K_CONTIGUOUS_,
          bool PERMUTED = K_CONTIGUOUS_ || sizeof(T_) == 2>
struct Tile {
  using T = T_;
  static constexpr int OUTER = OUTER_;
  static constexpr int K = K_;
  static constexpr bool K_CONTIGUOUS = K_CONTIGUOUS_;
  static constexpr int ROWS = K_CONTIGUOUS ? OUTER : K;
  static constexpr int COLUMNS = K_CONTIGUOUS ? K : OUTER;
  static constexpr int CHUNK = 16 / sizeof(T);  // elements
  static constexpr int CHUNKS = COLUMNS / CHUNK;
  static constexpr int SIZE = ROWS * COLUMNS;
  static constexpr int BYTES = SIZE * sizeof(T);
  static_assert(COLUMNS % CHUNK == 0 && (CHUNKS & (CHUNKS - 1)) == 0);

  __device__ static int offset(int row, int column) {
    constexpr int SPAN = !PERMUTED ? 1 : CHUNKS < 8 ? CHUNKS : 8;
    const int chunk = (column / CHUNK) ^ (row / (8 / SPAN) % SPAN);
    return (row * CHUNKS + chunk) * CHUNK + column % CHUNK;
  }

  // Offset of element (outer, k), whichever of the two is contiguous.
  __device__ static int at(int outer, int k) {
    return K_CONTIGUOUS ? offset(outer, k) : offset(k, outer);
  }
};

// Starts the copy of the tile at (row0, column0) of `source`; outside of the matrix is zero.
//
// The tile's rows from `rows` on and its chunks from `columns` on are left unchanged. A
// matrix whose rows are not 16-byte aligned is copied in 4-byte pieces, and one of odd 16-bit
// rows an element at a time, without cp.async.
template <class Tile, int THREADS>
__device__ inline void load_tile(typename Tile::T* tile, const Matrix& source, int row0,
                                 int column0, int rows = Tile::ROWS,
                                 int columns = Tile::COLUMNS) {
  using T = typename Tile::T;
  // A thread copies the same chunk of every ROW_STEP-th row.
  constexpr int ROW_STEP = THREADS / Tile::CHUNKS;
  static_assert(THREADS % Tile::CHUNKS == 0);
  const int first = threadIdx.x / Tile::CHUNKS;
  const int column = threadIdx.x % Tile::CHUNKS * Tile::CHUNK;
  if (column >= columns) return;
  const int in_row = min(max(source.columns - column0 - column, 0), Tile::CHUNK);
  const T* data = static_cast<const T*>(source.data);
  const T* chunk = data + static_cast<int64_t>(row0 + first) * source.stride + column0 + column;

  // Calls copy(to, from, valid) for the next chunk, of which `valid` elements are in the matrix.
  const auto copy_next = [&](int row, auto copy) {
    const int valid = row0 + row < source.rows ? in_row : 0;
    if (row < rows) copy(tile + Tile::offset(row, column), valid ? chunk : data, valid);
    chunk += ROW_STEP * source.stride;
  };
  if (source.copy_bytes == 16) {
#pragma unroll
    for (int i = 0; i < Tile::ROWS; i += ROW_STEP)
      copy_next(first + i, [](T* to, const T* from, int valid) {
        cp_async<16>(to, from, valid * sizeof(T));
      });
  } else if (source.copy_bytes == 4) {
#pragma unroll 1
    for (int i = 0; i < Tile::ROWS; i += ROW_STEP)
      copy_next(first + i, [](T* to, const T* from, int valid) {
        constexpr int PIECE = 4 / sizeof(T);
        for (int j = 0; j < Tile::CHUNK; j += PIECE) {
          const int inside = min(max(valid - j, 0), PIECE);
          cp_async<4>(to + j, inside ? from + j : from, inside * sizeof(T));
        }
      });
  } else {
#pragma unroll 1
    for (int i = 0; i < Tile::ROWS; i += ROW_STEP)
      copy_next(first + i, [](T* to, const T* from, int valid) {
        for (int j = 0; j < Tile::CHUNK; ++j) to[j] = j < valid ? from[j] : from_float<T>(0.f);
      });
  }
}

}  // namespace lorasb
