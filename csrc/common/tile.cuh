// Operand tiles in shared memory, and the copies that fill them.
#pragma once

#include "pipeline.cuh"

namespace lorasb {

// The largest power of two that divides `value`, at most 8.
__host__ __device__ constexpr int power_of_two_in(int value) { return value % 8 == 0 ? 8 : value & -value; }

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
  static_assert(COLUMNS % CHUNK == 0);

  __device__ static int offset(int row, int column) {
    constexpr int SPAN = PERMUTED ? power_of_two_in(CHUNKS) : 1;  // chunks that change places
    const int chunk = (column / CHUNK) ^ (row / (8 / SPAN) % SPAN);
    return (row * CHUNKS + chunk) * CHUNK + column % CHUNK;
  }

  // Offset of element (outer, k), whichever of the two is contiguous.
  __device__ static int at(int outer, int k) {
    return K_CONTIGUOUS ? offset(outer, k) : offset(k, outer);
  }
};

// Copies the tiles of an operand, one after the other along the contraction.
//
// Past the end of the contraction a tile is zero. Past the last outer index it repeats that index
// (or its chunk of 16 bytes): such rows and columns of a product are computed and never stored, so
// the copies of a whole step need no predicates.
template <class Tile, int THREADS>
class TileLoader {
  using T = typename Tile::T;
  static constexpr int CHUNKS = Tile::ROWS * Tile::CHUNKS;
  static constexpr int COPIES = ceil_div(CHUNKS, THREADS);  // of each thread

 public:
  // The first tile is at (outer, k) of an operand whose rows, as those of the tile, run along K
  // or along the outer dimension.
  __device__ TileLoader(const Matrix& source, int outer, int k)
      : left_((Tile::K_CONTIGUOUS ? source.columns : source.rows) - k),
        advance_(Tile::K_CONTIGUOUS ? Tile::K : Tile::K * source.stride) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      int row = row_of(i), column = column_of(i);
      if constexpr (Tile::K_CONTIGUOUS) {
        row = min(outer + row, source.rows - 1);
        column += k;
      } else {
        row += k;
        column = min(outer + column, (source.columns - 1) / Tile::CHUNK * Tile::CHUNK);
      }
      from_[i] = static_cast<const T*>(source.data) + row * source.stride + column;
    }
  }

  // Starts the copy of the next tile.
  __device__ void next(T* tile) {
    if (left_ >= Tile::K)
      copy(tile, [](int) { return true; });
    else
      copy(tile, [&](int i) { return (Tile::K_CONTIGUOUS ? column_of(i) : row_of(i)) < left_; });
    left_ -= Tile::K;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) from_[i] += advance_;
  }

 private:
  // Where the thread's i-th chunk is in the tile. With THREADS a multiple of a row's chunks it is
  // always in the same column.
  __device__ static int row_of(int i) {
    if constexpr (THREADS % Tile::CHUNKS == 0)
      return threadIdx.x / Tile::CHUNKS + i * (THREADS / Tile::CHUNKS);
    else
      return (threadIdx.x + i * THREADS) / Tile::CHUNKS;
  }
  __device__ static int column_of(int i) {
    if constexpr (THREADS % Tile::CHUNKS == 0)
      return threadIdx.x % Tile::CHUNKS * Tile::CHUNK;
    else
      return (threadIdx.x + i * THREADS) % Tile::CHUNKS * Tile::CHUNK;
  }

  __device__ static int offset_of(int i) {
    constexpr int ROW_STEP = THREADS / Tile::CHUNKS;
    if constexpr (THREADS % Tile::CHUNKS == 0 && ROW_STEP % 8 == 0)
      // The permutation of chunks repeats after eight rows, so one address serves all copies.
      return Tile::offset(row_of(0), column_of(0)) + i * ROW_STEP * Tile::COLUMNS;
    else
      return Tile::offset(row_of(i), column_of(i));
  }

  template <class Inside>
  __device__ void copy(T* tile, Inside inside) const {
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
      if (CHUNKS % THREADS == 0 || static_cast<int>(threadIdx.x) + i * THREADS < CHUNKS)
        cp_async<16>(tile + offset_of(i), from_[i], inside(i) ? 16 : 0);
  }

  const T* from_[COPIES];
  int left_;  // contraction indices that are not copied yet
  int64_t advance_;
};

}  // namespace lorasb
