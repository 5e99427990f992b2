// A long product onto the rank, and the core applied to it before it is rounded:
//
//     first  = drop(x) F      [M, r]    F = Aᵀ (shrink) or B (core_backward)
//     second = s · first C    [M, r]    C = Rᵀ           or R
//
// Reads x once (M·K elements; F is re-read from L2 by each block of rows), writes 2·M·r
// elements; 2·M·r·(K + r) flops: memory bound up to ranks of 100 to 300.
//
// A block holds all r columns of its rows in accumulators, so x is read once at any rank.
// With few rows, K is split over blocks: each stores its partial sums, and the block that
// arrives last adds them in the order of the splits, so the same inputs give the same bits.
#pragma once

#include "common/dropout.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace lorasb {

struct RankProductParams {
  Matrix x;         // [M, K]
  Matrix factor;    // [r, K], or [K, r] in backward
  Matrix core;      // [r, r] fp32
  int rank;
  float scaling;
  Dropout dropout;
  void* first;      // [M, r] contiguous
  void* second;     // [M, r] contiguous
  int splits;
  float4* partials;
  int* arrivals;    // zero, one per block of rows
};

// RANK is a bucket, the largest rank the tiles can hold; work is done for the actual rank.
template <typename T_, int RANK_, bool BACKWARD_>
struct RankProductTraits {
  using T = T_;
  static constexpr int RANK = RANK_;
  static constexpr bool BACKWARD = BACKWARD_;
  static constexpr int WARPS_N = RANK / 128;  // a warp's 16×128 accumulators take 64 registers
  static constexpr int WARPS_M = WARPS_N == 1 ? 4 : 2;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int BLOCK_M = 16 * WARPS_M;
  static constexpr int BLOCK_K = 64 / sizeof(T);
  static constexpr int CORE_K = WARPS_N == 1 ? 16 : 8;
  static constexpr int STAGES = WARPS_N == 1 ? 4 : 2;
  static constexpr int TILES = 16;

  using X = Tile<T, BLOCK_M, BLOCK_K, true>;
  using Factor = Tile<T, RANK, BLOCK_K, !BACKWARD>;
  using First = Tile<float, BLOCK_M, RANK, true>;
  using Core = Tile<float, RANK, CORE_K, !BACKWARD>;

  static constexpr int STAGE_BYTES = X::BYTES + Factor::BYTES;
  static constexpr int PRODUCT_BYTES = STAGES * STAGE_BYTES;
  static constexpr int CORE_BYTES = First::BYTES + 2 * Core::BYTES;
  static constexpr int SHARED_BYTES = PRODUCT_BYTES > CORE_BYTES ? PRODUCT_BYTES : CORE_BYTES;
};

// Loads the tile of a [rank, K] operand, or its transpose, at contraction index k.
template <class Tile, int THREADS>
__device__ inline void load_rank_tile(typename Tile::T* tile, const Matrix& source, int rank,
                                      int k) {
  const int used = ceil_div(rank, 16) * 16;  // fragments are loaded 16 ranks at a time
  if constexpr (Tile::K_CONTIGUOUS)
    load_tile<Tile, THREADS>(tile, source, 0, k, used, Tile::COLUMNS);
  else
    load_tile<Tile, THREADS>(tile, source, k, 0, Tile::ROWS, used);
}

// Stores this block's partial sums; true in the block that arrives last, which then holds the
// sums over all splits. `arrived` is a word of shared memory.
template <class Traits>
__device__ inline bool reduce_splits(float (&acc)[1][Traits::TILES][4], int tiles,
                                     const RankProductParams& params, int* arrived) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * params.splits;
  const auto partial = [&](int64_t split, int j) {
    return params.partials + ((first + split) * Traits::TILES + j) * Traits::THREADS + threadIdx.x;
  };
#pragma unroll
  for (int j = 0; j < Traits::TILES; ++j)
    if (j < tiles)
      *partial(blockIdx.y, j) = make_float4(acc[0][j][0], acc[0][j][1], acc[0][j][2], acc[0][j][3]);

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *arrived = atomicAdd(params.arrivals + blockIdx.x, 1);
  __syncthreads();
  const bool last = *arrived == params.splits - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll
  for (int j = 0; j < Traits::TILES; ++j) {
    if (j >= tiles) break;
    float4 sum = __ldcg(partial(0, j));
    for (int split = 1; split < params.splits; ++split) {
      const float4 next = __ldcg(partial(split, j));
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    acc[0][j][0] = sum.x, acc[0][j][1] = sum.y, acc[0][j][2] = sum.z, acc[0][j][3] = sum.w;
  }
  return true;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS)
    rank_product_kernel(const __grid_constant__ RankProductParams params) {
  using T = typename Traits::T;
  using X = typename Traits::X;
  using Factor = typename Traits::Factor;
  using First = typename Traits::First;
  using Core = typename Traits::Core;
  constexpr int TILES = Traits::TILES;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Traits::WARPS_N * 16;
  const int row0 = blockIdx.x * Traits::BLOCK_M;
  const int K = params.x.columns;

  // The ranks are distributed evenly over the warps, in pairs of 8.
  const int per_warp = ceil_div(params.rank, 16 * Traits::WARPS_N) * 2;
  const int warp_rank = warp % Traits::WARPS_N * per_warp * 8;
  const int tiles = max(0, min(per_warp, ceil_div(params.rank - warp_rank, 8)));

  const int steps = ceil_div(K, Traits::BLOCK_K);
  const int steps_per_split = ceil_div(steps, params.splits);
  const int first_step = blockIdx.y * steps_per_split;
  const int own_steps = min(steps_per_split, steps - first_step);

  float acc[1][TILES][4] = {};
  const int64_t seed = params.dropout.seed ? *params.dropout.seed : 0;
  const auto x_stage = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * Traits::STAGE_BYTES);
  };
  pipeline<Traits::STAGES>(
      own_steps,
      [&](int step, int stage) {
        const int k = (first_step + step) * Traits::BLOCK_K;
        load_tile<X, Traits::THREADS>(x_stage(stage), params.x, row0, k);
        load_rank_tile<Factor, Traits::THREADS>(x_stage(stage) + X::SIZE, params.factor,
                                                params.rank, k);
      },
      [&](int step, int stage) {
        const auto drop = [&](auto& a, int, int k) {
          if (params.dropout.seed == nullptr) return;
          const uint64_t corner = static_cast<uint64_t>(row0 + warp_row) * K +
                                  (first_step + step) * Traits::BLOCK_K + k;
          Fragments<T>::mask(a, [&](int row, int column) {
            return random_bits(corner + static_cast<uint64_t>(row) * K + column, seed) >=
                   params.dropout.threshold;
          });
        };
        warp_multiply<X, Factor>(acc, x_stage(stage), x_stage(stage) + X::SIZE, warp_row,
                                 warp_rank, tiles, 0, drop);
      });
  if (params.splits > 1 &&
      !reduce_splits<Traits>(acc, tiles, params, reinterpret_cast<int*>(shared)))
    return;

  const auto for_each = [&](int count, auto function) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      if (j >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        function(warp_row + lane_group() + i / 2 * 8,
                 warp_rank + 8 * j + lane_pair() + i % 2, acc[0][j][i]);
    }
  };
  const auto store = [&](void* out, int row, int rank, float value) {
    if (row0 + row < params.x.rows && rank < params.rank)
      static_cast<T*>(out)[static_cast<int64_t>(row0 + row) * params.rank + rank] =
          from_float<T>(value);
  };

  float* first = reinterpret_cast<float*>(shared);
  float* cores = first + First::SIZE;
  // The core reads `first` 16 ranks at a time. Past the rank the factor is 0, but 0 · Inf is NaN.
  for_each(ceil_div(tiles, 2) * 2, [&](int row, int rank, float& value) {
    value = rank < params.rank ? value * params.dropout.scale : 0.f;
    first[First::at(row, rank)] = value;
    store(params.first, row, rank, value);
    value = 0.f;
  });
  pipeline<2>(
      ceil_div(params.rank, Traits::CORE_K),
      [&](int step, int stage) {
        load_rank_tile<Core, Traits::THREADS>(cores + stage * Core::SIZE, params.core,
                                              params.rank, step * Traits::CORE_K);
      },
      [&](int step, int stage) {
        warp_multiply<First, Core>(acc, first, cores + stage * Core::SIZE, warp_row, warp_rank,
                                   tiles, step * Traits::CORE_K);
      });
  for_each(tiles, [&](int row, int rank, float& value) {
    store(params.second, row, rank, params.scaling * value);
  });
}

// How a product is split into blocks, and where its scratch memory is.
struct RankProductPlan {
  int64_t row_blocks;
  int splits;
  size_t partial_bytes, workspace_bytes;

  // Splits K until there are two blocks per multiprocessor, down to 8 steps per split.
  template <class Traits>
  static RankProductPlan of(int64_t rows, int64_t K, int multiprocessors) {
    RankProductPlan plan{};
    plan.row_blocks = ceil_div<int64_t>(rows, Traits::BLOCK_M);
    const int64_t steps = ceil_div<int64_t>(K, Traits::BLOCK_K);
    const int64_t wanted = plan.row_blocks ? 2 * multiprocessors / plan.row_blocks : 1;
    const int64_t splits = wanted < steps / 8 ? wanted : steps / 8;
    plan.splits = splits < 1 ? 1 : ceil_div(steps, ceil_div(steps, splits));
    if (plan.splits > 1) {
      plan.partial_bytes = plan.row_blocks * plan.splits * sizeof(float4) * Traits::TILES *
                           Traits::THREADS;
      plan.workspace_bytes = plan.partial_bytes + plan.row_blocks * sizeof(int);
    }
    return plan;
  }
};

// Calls `function(traits)` with the traits of the dtype and the rank's bucket.
template <bool BACKWARD, class Function>
auto dispatch_rank(DType dtype, int64_t rank, Function function) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return rank <= 128 ? function(RankProductTraits<T, 128, BACKWARD>{})
                       : function(RankProductTraits<T, 512, BACKWARD>{});
  });
}

template <bool BACKWARD>
size_t rank_product_workspace(DType dtype, int64_t rank, int64_t rows, int64_t K) {
  return dispatch_rank<BACKWARD>(dtype, rank, [&](auto traits) {
    return RankProductPlan::of<decltype(traits)>(rows, K, multiprocessors()).workspace_bytes;
  });
}

// Fills in the plan's part of `params` and launches.
template <bool BACKWARD>
Launch rank_product(DType dtype, RankProductParams params, void* workspace, const char* name,
                    cudaStream_t stream) {
  return dispatch_rank<BACKWARD>(dtype, params.rank, [&](auto traits) {
    using Traits = decltype(traits);
    if (params.x.rows == 0) return Launch{};
    const auto plan =
        RankProductPlan::of<Traits>(params.x.rows, params.x.columns, multiprocessors());
    const dim3 grid(static_cast<unsigned>(plan.row_blocks), plan.splits);
    params.splits = plan.splits;
    params.partials = static_cast<float4*>(workspace);
    params.arrivals =
        reinterpret_cast<int*>(static_cast<unsigned char*>(workspace) + plan.partial_bytes);
    if (plan.splits > 1) {
      const cudaError_t error =
          cudaMemsetAsync(params.arrivals, 0, plan.row_blocks * sizeof(int), stream);
      if (error != cudaSuccess) return Launch{error, "cudaMemsetAsync", grid};
    }
    return launch(rank_product_kernel<Traits>, name, grid, Traits::THREADS, Traits::SHARED_BYTES,
                  params, stream);
  });
}

}  // namespace lorasb
