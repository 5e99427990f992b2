// Stores of results to global memory.
#pragma once

#include "elements.cuh"

namespace lorasb {

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Stores elements `column` (even) and the next of a row of `columns` elements; in one store if
// `aligned`, that is if rows start at multiples of two elements.
template <typename T>
__device__ inline void store_pair(T* row, int column, int columns, bool aligned, float low,
                                  float high) {
  T* out = row + column;
  if (aligned && column + 1 < columns) {
    *reinterpret_cast<Pair<T>*>(out) = {from_float<T>(low), from_float<T>(high)};
  } else {
    if (column < columns) out[0] = from_float<T>(low);
    if (column + 1 < columns) out[1] = from_float<T>(high);
  }
}

// A tile of results in shared memory, on its way from accumulators to rows of global memory.
template <typename T, int ROWS, int COLUMNS>
struct ResultTile {
  static constexpr int CHUNK = 16 / sizeof(T);
  static constexpr int PITCH = COLUMNS + 8;  // eight rows of pairs touch all 32 banks
  static constexpr int BYTES = ROWS * PITCH * sizeof(T);

  __device__ static void put(T* tile, int row, int column, float low, float high) {
    *reinterpret_cast<Pair<T>*>(tile + row * PITCH + column) = {from_float<T>(low),
                                                               from_float<T>(high)};
  }

  // Stores the elements inside of rows × columns, by rows of 16-byte chunks where `stride` is a
  // multiple of a chunk; `out` is then the address of one.
  template <int THREADS>
  __device__ static void store(const T* tile, T* out, int stride, int rows, int columns) {
    if (stride % CHUNK == 0) {
      constexpr int CHUNKS = COLUMNS / CHUNK;
      for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
        if (row < rows && column < columns)
          *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * stride + column) =
              *reinterpret_cast<const uint4*>(tile + row * PITCH + column);
      }
    } else {
      for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        if (row < rows && column < columns)
          out[static_cast<int64_t>(row) * stride + column] = tile[row * PITCH + column];
      }
    }
  }
};

}  // namespace lorasb
