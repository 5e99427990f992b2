// The kernel of the product onto the rank (rank_product.h).
//
// Reads x once (M·K elements; F is re-read from L2 by each block of rows), writes 2·M·r
// elements; 2·M·r·(K + r) flops: memory bound up to ranks of 100 to 300.
//
// A block holds all r columns of its rows in accumulators, so x is read once at any rank, and each
// tensor-core product is computed once. The rank is rounded up to that of a kernel: a loop bound
// known at compile time lets the fragments of one product be loaded during another.
//
// With few rows, K is split over blocks: each stores its partial sums, and the block that
// arrives last adds them in the order of the splits, so the same inputs give the same bits.
//
// Layers that read the same x run in one launch. The blocks of a row tile follow each other, so
// the later ones find x in L2.
#pragma once

#include "common/dropout.cuh"
#include "common/launch.cuh"
#include "rank_core.cuh"
#include "rank_product.h"

namespace lorasb {

template <typename T_, int RANK_, int WARPS_M_, int WARPS_N_, int MI_, int STAGES_, int BLOCKS_,
          RankMode MODE_>
struct RankProductTraits {
  using T = T_;
  static constexpr int RANK = RANK_;  // the largest
  static constexpr RankMode MODE = MODE_;
  static constexpr bool BACKWARD = MODE == RankMode::BACKWARD;
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int THREADS = 32 * WARPS_M_ * WARPS_N;
  static constexpr int BLOCKS = BLOCKS_;  // of a multiprocessor with 100 KB of shared memory
  static constexpr int MI = MI_, NI = RANK / WARPS_N / 8;  // a warp's tiles of 16×8
  static constexpr int BLOCK_M = 16 * MI * WARPS_M_;
  static constexpr int BLOCK_K = 64 / sizeof(T);
  static constexpr int STAGES = STAGES_;
  static constexpr bool CORE_IN_REGISTERS = WARPS_N == 1 && sizeof(T) == 2;

  using X = Tile<T, BLOCK_M, BLOCK_K, true>;
  using Factor = Tile<T, RANK, BLOCK_K, !BACKWARD>;
  using First = SharedFirst<BLOCK_M, RANK>;

  static constexpr int STAGE_BYTES = X::BYTES + Factor::BYTES;
  static constexpr int LOOP_BYTES = STAGES * STAGE_BYTES;
  static constexpr int FIRST_BYTES = CORE_IN_REGISTERS ? 0 : First::BYTES;
  static constexpr int SHARED_BYTES = LOOP_BYTES > FIRST_BYTES ? LOOP_BYTES : FIRST_BYTES;

  static constexpr int PARTIAL = MI * NI * THREADS;  // float4's of a split
  // A thread has about 16 of the loads of partial sums in flight.
  static constexpr int SPLITS_AT_ONCE = ceil_div(16, MI * NI);
};

// Stores this block's partial sums; true in the block that arrives last, which then holds the
// sums over all splits. `arrived` is a word of shared memory.
template <class Traits>
__device__ inline bool reduce_splits(float (&acc)[Traits::MI][Traits::NI][4],
                                     const RankProductParams& params, unsigned* arrived) {
  constexpr int MI = Traits::MI, NI = Traits::NI;
  float4* partials = params.partials + threadIdx.x +
                     static_cast<int64_t>(blockIdx.x) * params.splits * Traits::PARTIAL;
  const auto for_each = [&](int split, auto function) {
    float4* partial = partials + static_cast<int64_t>(split) * Traits::PARTIAL;
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j) function(acc[i][j], partial + (i * NI + j) * Traits::THREADS);
  };
  for_each(blockIdx.y, [](const float (&c)[4], float4* partial) {
    *partial = make_float4(c[0], c[1], c[2], c[3]);
  });
  __threadfence();
  __syncthreads();
  // Wraps around to zero in the last block, for the next launch.
  if (threadIdx.x == 0) *arrived = atomicInc(params.arrivals + blockIdx.x, params.splits - 1);
  __syncthreads();
  if (*arrived != params.splits - 1u) return false;
  __threadfence();

  for_each(0, [](float (&c)[4], const float4* partial) {
    const float4 value = __ldcg(partial);
    c[0] = value.x, c[1] = value.y, c[2] = value.z, c[3] = value.w;
  });
#pragma unroll(Traits::SPLITS_AT_ONCE)
  for (int split = 1; split < params.splits; ++split)
    for_each(split, [](float (&c)[4], const float4* partial) {
      const float4 value = __ldcg(partial);
      c[0] += value.x, c[1] += value.y, c[2] += value.z, c[3] += value.w;
    });
  return true;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    rank_product_kernel(const __grid_constant__ RankProductParams params) {
  using T = typename Traits::T;
  using X = typename Traits::X;
  using Factor = typename Traits::Factor;
  constexpr int MI = Traits::MI, NI = Traits::NI, THREADS = Traits::THREADS;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Traits::WARPS_N * 16 * MI;
  const int warp_rank = warp % Traits::WARPS_N * 8 * NI;
  const int layer = blockIdx.x % params.layers;
  const int row0 = blockIdx.x / params.layers * Traits::BLOCK_M;
  const int M = params.x.rows, K = params.x.columns;
  const int rank = params.core[0].rows;  // of each layer

  const int steps = ceil_div(K, Traits::BLOCK_K);
  const int steps_per_split = ceil_div(steps, params.splits);
  const int first_step = blockIdx.y * steps_per_split;
  const int first_k = first_step * Traits::BLOCK_K;

  float acc[MI][NI][4] = {};
  const int64_t seed = Traits::MODE == RankMode::DROPOUT ? *params.dropout.seed : 0;
  const auto x_stage = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * Traits::STAGE_BYTES);
  };
  TileLoader<X, THREADS> x_loader(params.x, row0, first_k);
  TileLoader<Factor, THREADS> factor_loader(params.factor[layer], 0, first_k);
  pipeline<Traits::STAGES>(
      min(steps_per_split, steps - first_step),
      [&](int stage) {
        x_loader.next(x_stage(stage));
        factor_loader.next(x_stage(stage) + X::SIZE);
      },
      [&](int step, int stage) {
        const T* x = x_stage(stage);
        const T* factor = x + X::SIZE;
        if constexpr (Traits::MODE == RankMode::DROPOUT) {
          const auto drop = [&](auto& a, int i, int k) {
            const uint64_t corner = static_cast<uint64_t>(row0 + warp_row + 16 * i) * K + first_k +
                                    step * Traits::BLOCK_K + k;
            Fragments<T>::mask(a, [&](int row, int column) {
              return random_bits(corner + static_cast<uint64_t>(row) * K + column, seed) >=
                     params.dropout.threshold;
            });
          };
          warp_multiply<X, Factor>(acc, x, factor, warp_row, warp_rank, drop);
        } else {
          warp_multiply<X, Factor>(acc, x, factor, warp_row, warp_rank);
        }
      });
  if (params.splits > 1 &&
      !reduce_splits<Traits>(acc, params, reinterpret_cast<unsigned*>(shared)))
    return;

  const int64_t first_row = static_cast<int64_t>(layer) * M + row0;
  T* first = static_cast<T*>(params.first) + first_row * params.first_stride;
  T* second = static_cast<T*>(params.second) + first_row * rank;
  const int rows = M - row0;  // of this block, if below BLOCK_M
#pragma unroll
  for (int i = 0; i < 2 * MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j) {
      float(&pair)[2] = reinterpret_cast<float(&)[2]>(acc[i / 2][j][i % 2 * 2]);
      const int row = warp_row + 8 * i + lane_group(), column = warp_rank + 8 * j + lane_pair();
#pragma unroll
      for (int e = 0; e < 2; ++e)
        // Past the rank F repeats itself, and a zero of C would not undo an Inf: 0 · Inf is NaN.
        pair[e] = column + e < rank ? pair[e] * params.dropout.scale : 0.f;
      if (row < rows)
        store_pair(first + static_cast<int64_t>(row) * params.first_stride, column,
                   params.first_stride, params.first_stride % 2 == 0, pair[0], pair[1]);
      if constexpr (sizeof(T) == 2) pair[0] = to_tf32(pair[0]), pair[1] = to_tf32(pair[1]);
    }

  const typename Traits::First shared_first{reinterpret_cast<float*>(shared)};
  if constexpr (!Traits::CORE_IN_REGISTERS) {
    __syncthreads();
    shared_first.store(acc, warp_row, warp_rank);
    __syncthreads();
  }
  const CoreReader<Traits::BACKWARD> core(params.core[layer]);
#pragma unroll 1
  for (int n = warp_rank; n < min(rank, warp_rank + 8 * NI); n += 8) {
    float sum[MI][4] = {};
    multiply_core<Traits>(sum, acc, shared_first, core, warp_row, n);
#pragma unroll
    for (int i = 0; i < 2 * MI; ++i) {
      const int row = warp_row + 8 * i + lane_group();
      if (row < rows)
        store_pair(second + static_cast<int64_t>(row) * rank, n + lane_pair(), rank, rank % 2 == 0,
                   params.scaling * sum[i / 2][i % 2 * 2],
                   params.scaling * sum[i / 2][i % 2 * 2 + 1]);
    }
  }
}

}  // namespace lorasb
