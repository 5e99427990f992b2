// Operand tiles in shared memory.
#pragma once

#include "pipeline.cuh"

namespace lorasb {

// A tile of an operand with OUTER indices and K contraction indices, laid out as in global
// memory: rows along K when K is the contiguous dimension, along OUTER otherwise.
//
// The 16-byte chunks of a row are permuted so that eight rows at one column touch all 32
// banks: `ldmatrix`, which reads such columns, is free of conflicts without padding.
template <typename T_, int OUTER_, int K_, bool K_CONTIGUOUS_>
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
    constexpr int SPAN = CHUNKS < 8 ? CHUNKS : 8;
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
// The tile's rows at and past `rows` and its chunks at and past `columns` are left alone. A
// matrix whose rows are not 16-byte aligned is copied in 4-byte pieces, and one of odd 16-bit
// rows an element at a time, without cp.async.
template <class Tile, int THREADS>
__device__ inline void load_tile(typename Tile::T* tile, const Matrix& source, int64_t row0,
                                 int64_t column0, int rows = Tile::ROWS,
                                 int columns = Tile::COLUMNS) {
  using T = typename Tile::T;
  constexpr int PIECE = 4 / sizeof(T);
  const T* data = static_cast<const T*>(source.data);
#pragma unroll
  for (int i = threadIdx.x; i < Tile::ROWS * Tile::CHUNKS; i += THREADS) {
    const int row = i / Tile::CHUNKS, column = i % Tile::CHUNKS * Tile::CHUNK;
    if (row >= rows || column >= columns) continue;
    const int64_t inside = row0 + row < source.rows ? source.columns - column0 - column : 0;
    const int valid = inside <= 0 ? 0 : inside < Tile::CHUNK ? inside : Tile::CHUNK;
    const T* from = valid ? data + (row0 + row) * source.stride + column0 + column : data;
    T* to = tile + Tile::offset(row, column);
    if (source.copy_bytes == 16) {
      cp_async<16>(to, from, valid * sizeof(T));
    } else if (source.copy_bytes == 4) {
#pragma unroll
      for (int j = 0; j < Tile::CHUNK; j += PIECE) {
        const int piece = valid <= j ? 0 : valid - j < PIECE ? valid - j : PIECE;
        cp_async<4>(to + j, piece ? from + j : data, piece * sizeof(T));
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tile::CHUNK; ++j) to[j] = j < valid ? from[j] : from_float<T>(0.f);
    }
  }
}

}  // namespace lorasb
