// G = (w ⊙ a)ᵀ b: a product contracted over tokens.
//
// A block holds a 128×128 tile of G in registers over all its tokens. 2·M·m·n flops; reads a
// n/128 times and b m/128 times, from L2 for the most part.
//
// The row weight is multiplied in fp32 and the product is not rounded to 16 bits: it is split into
// three bf16 numbers, which together hold all 24 bits, and multiplied part by part.
#include "token_product.h"

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/split.cuh"

namespace lorasb {
namespace {

template <typename T_, bool WEIGHTED_>
struct TokenProductTraits {
  using T = T_;
  static constexpr bool WEIGHTED = WEIGHTED_;
  static constexpr int BLOCK = 128;  // of m and of n
  static constexpr int BLOCK_K = 64 / sizeof(T);
  static constexpr int THREADS = 256;
  // Two blocks share an sm_86 multiprocessor, at 48 KB and 128 registers per thread.
  static constexpr int MIN_BLOCKS = WEIGHTED || std::is_same_v<T, float> ? 1 : 2;
  static constexpr int STAGES = 3;
  static constexpr int WARPS_N = 4;
  static constexpr int MI = 4, NI = 4;  // a warp's tiles of 16×8: 64×32

  using Operand = Tile<T, BLOCK, BLOCK_K, false>;
  static constexpr int WEIGHT_BYTES = WEIGHTED ? BLOCK_K * sizeof(float) : 0;
  static constexpr int STAGE_BYTES = 2 * Operand::BYTES + WEIGHT_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

// warp_multiply for 16-bit elements with the rows of A, its contraction indices, weighted.
template <class Tile, int MI, int NI>
__device__ inline void warp_multiply_weighted(float (&acc)[MI][NI][4], const typename Tile::T* a,
                                              const typename Tile::T* b, const float* weight,
                                              int m, int n) {
  using T = typename Tile::T;
  using F = Fragments<T>;
  constexpr int A_PARTS = 3;                                  // 24 bits
  constexpr int B_PARTS = std::is_same_v<T, bf16> ? 1 : 2;    // 8 bits, or 11
#pragma unroll
  for (int k = 0; k < Tile::K; k += F::K) {
    uint32_t fb[B_PARTS][NI / 2][4];
#pragma unroll
    for (int j = 0; j < NI / 2; ++j) {
      F::template load_b<Tile>(fb[0][j], b, n + 16 * j, k);
      if constexpr (B_PARTS == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 values = unpack(fb[0][j][i], T{});
          fb[0][j][i] = take_bf16(values.x, values.y);
          fb[1][j][i] = take_bf16(values.x, values.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      uint32_t fa[A_PARTS][4];
      F::template load_a<Tile>(fa[0], a, m + 16 * i, k);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* w = weight + k + lane_pair() + e / 2 * 8;
        float2 values = unpack(fa[0][e], T{});
        values.x *= w[0];
        values.y *= w[1];
#pragma unroll
        for (int part = 0; part < A_PARTS; ++part) fa[part][e] = take_bf16(values.x, values.y);
      }
#pragma unroll
      for (int j = 0; j < NI; ++j)
#pragma unroll
        for (int u = 0; u < A_PARTS; ++u)
#pragma unroll
          for (int v = 0; v < B_PARTS; ++v)
            mma_m16n8k16(acc[i][j], fa[u], fb[v][j / 2][j % 2 * 2], fb[v][j / 2][j % 2 * 2 + 1],
                         bf16{});
    }
  }
}

// Writes the signs of the warp's 32 columns, one word of each plane a row.
template <int MI>
__device__ inline void store_signs(const float (&acc)[MI][4][4], const TokenProductParams& params,
                                   int row0, int column0) {
  const int words = ceil_div(params.b.columns, 32);
#pragma unroll
  for (int i = 0; i < 2 * MI; ++i) {
    uint32_t positive = 0, negative = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int bit = e / 2 * 8 + lane_pair() + e % 2;
      const float value = acc[i / 2][e / 2][i % 2 * 2 + e % 2];
      const bool inside = column0 + bit < params.b.columns;
      const bool bad = !isfinite(value);
      positive |= static_cast<uint32_t>(inside && (value > 0 || bad)) << bit;
      negative |= static_cast<uint32_t>(inside && (value < 0 || bad)) << bit;
    }
    // The four threads of a group hold disjoint bits of one row's word.
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
      positive |= __shfl_xor_sync(0xFFFFFFFF, positive, lane);
      negative |= __shfl_xor_sync(0xFFFFFFFF, negative, lane);
    }
    const int row = row0 + 8 * i + lane_group();
    if (row >= params.a.columns || column0 >= params.b.columns) continue;
    const int64_t word = static_cast<int64_t>(row) * words + column0 / 32;
    if (lane_pair() == 0) params.positive[word] = positive;
    if (lane_pair() == 2) params.negative[word] = negative;
  }
}

// Writes the accumulators to `out`, or adds them.
template <int MI, int NI>
__device__ inline void store_sums(const float (&acc)[MI][NI][4], const TokenProductParams& params,
                                  int row0, int column0) {
  const bool add = params.output == TokenProductParams::ADD;
  const int64_t slice = add ? 0 : blockIdx.z * params.a.columns * params.out_stride;
  const bool pairs = params.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(params.out) % 8 == 0;
#pragma unroll
  for (int i = 0; i < 2 * MI; ++i) {
    const int row = row0 + 8 * i + lane_group();
    if (row >= params.a.columns) continue;
#pragma unroll
    for (int j = 0; j < NI; ++j) {
      const int column = column0 + 8 * j + lane_pair();
      const float low = acc[i / 2][j][i % 2 * 2], high = acc[i / 2][j][i % 2 * 2 + 1];
      float* out = params.out + slice + row * params.out_stride + column;
      if (pairs && column + 1 < params.b.columns) {
        float2* pair = reinterpret_cast<float2*>(out);
        const float2 old = add ? *pair : make_float2(0.f, 0.f);
        *pair = make_float2(old.x + low, old.y + high);
      } else {
        if (column < params.b.columns) out[0] = (add ? out[0] : 0.f) + low;
        if (column + 1 < params.b.columns) out[1] = (add ? out[1] : 0.f) + high;
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::MIN_BLOCKS)
    token_product_kernel(const __grid_constant__ TokenProductParams params) {
  using T = typename Traits::T;
  using Operand = typename Traits::Operand;
  constexpr int THREADS = Traits::THREADS, BLOCK_K = Traits::BLOCK_K;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int warp_m = warp / Traits::WARPS_N * 16 * Traits::MI;
  const int warp_n = warp % Traits::WARPS_N * 8 * Traits::NI;
  const int m0 = blockIdx.y * Traits::BLOCK, n0 = blockIdx.x * Traits::BLOCK;
  const bool inside = m0 + warp_m < params.a.columns && n0 + warp_n < params.b.columns;

  const int tokens = params.a.rows;
  const int steps = ceil_div(tokens, BLOCK_K);
  const int steps_per_split = ceil_div<int>(steps, gridDim.z);
  const int first_step = min(steps, static_cast<int>(blockIdx.z) * steps_per_split);
  const int own_steps = min(steps_per_split, steps - first_step);

  float acc[Traits::MI][Traits::NI][4] = {};
  const auto stage_a = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * Traits::STAGE_BYTES);
  };
  const auto stage_weight = [&](int stage) {
    return reinterpret_cast<float*>(stage_a(stage) + 2 * Operand::SIZE);
  };
  int next_token = first_step * BLOCK_K;
  TileLoader<Operand, THREADS> a_loader(params.a, m0, next_token);
  TileLoader<Operand, THREADS> b_loader(params.b, n0, next_token);
  pipeline<Traits::STAGES>(
      own_steps,
      [&](int stage) {
        a_loader.next(stage_a(stage));
        b_loader.next(stage_a(stage) + Operand::SIZE);
        if (Traits::WEIGHTED && threadIdx.x < BLOCK_K) {
          const int row = next_token + threadIdx.x;
          cp_async<4>(stage_weight(stage) + threadIdx.x,
                      params.weight + (row < tokens ? row : 0), row < tokens ? 4 : 0);
        }
        next_token += BLOCK_K;
      },
      [&](int, int stage) {
        if (!inside) return;
        const T* a = stage_a(stage);
        const T* b = a + Operand::SIZE;
        if constexpr (!Traits::WEIGHTED) {
          warp_multiply<Operand, Operand>(acc, a, b, warp_m, warp_n);
        } else if constexpr (std::is_same_v<T, float>) {
          const float* weight = stage_weight(stage);
          warp_multiply<Operand, Operand>(acc, a, b, warp_m, warp_n,
                                          [&](auto& fragment, int, int k) {
#pragma unroll
                                            for (int i = 0; i < 8; ++i)
                                              fragment[i / 4][i % 4] *= weight[k + i % 4];
                                          });
        } else {
          warp_multiply_weighted<Operand>(acc, a, b, stage_weight(stage), warp_m, warp_n);
        }
      });
  if (params.output == TokenProductParams::SIGNS)
    store_signs(acc, params, m0 + warp_m, n0 + warp_n);
  else
    store_sums(acc, params, m0 + warp_m, n0 + warp_n);
}

template <class Traits>
Launch launch_token_product(const TokenProductParams& params, int slices, const char* name,
                            cudaStream_t stream) {
  if (params.a.columns == 0 || params.b.columns == 0) return {};
  const dim3 grid(ceil_div(params.b.columns, Traits::BLOCK),
                  ceil_div(params.a.columns, Traits::BLOCK), slices);
  return launch(token_product_kernel<Traits>, name, grid, Traits::THREADS, Traits::SHARED_BYTES,
                params, stream);
}

}  // namespace

int token_slices(DType dtype, int64_t tokens, int64_t m, int64_t n) {
  return dispatch(dtype, [&](auto type) {
    using Traits = TokenProductTraits<typename decltype(type)::type, false>;
    const int64_t tiles = ceil_div<int64_t>(m, Traits::BLOCK) * ceil_div<int64_t>(n, Traits::BLOCK);
    if (tiles == 0) return 1;
    const int64_t wanted = multiprocessors() * Traits::MIN_BLOCKS / tiles;
    const int64_t most = tokens / (4 * Traits::BLOCK_K);
    const int64_t slices = wanted < most ? wanted : most;
    return slices < 1 ? 1 : static_cast<int>(slices);
  });
}

Launch token_product(DType dtype, const TokenProductParams& params, int slices, const char* name,
                     cudaStream_t stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return params.weight
               ? launch_token_product<TokenProductTraits<T, true>>(params, slices, name, stream)
               : launch_token_product<TokenProductTraits<T, false>>(params, slices, name, stream);
  });
}

}  // namespace lorasb
