// S Z and Sᵀ Z for a packed sign matrix S [m, n] and a dense fp32 Z.
//
// Reads m·n/4 bytes of planes and Z, writes the product; 2·m·n·q flops. Signs are exact in
// bf16 and an fp32 number is the exact sum of three bf16 ones, so three bf16 products with an
// fp32 accumulator give fp32 accuracy on tensor cores. Signs are unpacked straight into
// fragments; the dense sign matrix is never formed. An element with both bits set is NaN.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/split.cuh"

namespace lorasb {
namespace {

template <bool TRANSPOSE_>
struct SignMatmulTraits {
  static constexpr bool TRANSPOSE = TRANSPOSE_;
  static constexpr int BLOCK_M = 64;  // rows of the output
  static constexpr int BLOCK_N = 64;  // columns of Z
  static constexpr int BLOCK_K = 32;
  static constexpr int WARPS_N = 2;
  static constexpr int THREADS = 128;
  static constexpr int STAGES = 4;
  static constexpr int MI = 2, NI = 4;

  using Dense = Tile<float, BLOCK_N, BLOCK_K, false, true>;
  // A step needs 64 words of each plane: one of each of 64 rows, or two of each of 32 rows when
  // transposed.
  static constexpr int WORDS = BLOCK_M * BLOCK_K / 32;
  static constexpr int STAGE_BYTES = Dense::BYTES + 2 * WORDS * sizeof(uint32_t);
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

// Two bf16 signs from two bits of each plane, at bits 0 and 16.
__device__ inline uint32_t bf16_signs(uint32_t positive, uint32_t negative) {
  constexpr uint32_t ONE = 0x3F80, MINUS_ONE = 0xBF80, NOT_A_NUMBER = 0x7FC0;
  return positive * ONE ^ negative * MINUS_ONE | (positive & negative) * NOT_A_NUMBER;
}

// Bits of elements (row, k) and (row, k + 1) of the step's signs, at bits 0 and 16.
template <bool TRANSPOSE>
__device__ inline uint32_t two_bits(const uint32_t* plane, int row, int k) {
  if constexpr (TRANSPOSE) {
    const uint32_t* word = plane + 2 * k + row / 32;
    return (word[0] >> row % 32 & 1) | (word[2] >> row % 32 & 1) << 16;
  } else {
    const uint32_t bits = plane[row] >> k & 3;
    return (bits | bits << 15) & 0x00010001;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS)
    sign_matmul_kernel(const __grid_constant__ SignMatmulParams params) {
  using Dense = typename Traits::Dense;
  constexpr bool TRANSPOSE = Traits::TRANSPOSE;
  constexpr int WORDS = Traits::WORDS;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int warp_m = warp / Traits::WARPS_N * 16 * Traits::MI;
  const int warp_n = warp % Traits::WARPS_N * 8 * Traits::NI;
  const int m0 = blockIdx.x * Traits::BLOCK_M, n0 = blockIdx.y * Traits::BLOCK_N;
  const int rows = TRANSPOSE ? params.n : params.m, q = params.dense.columns;
  const int words = ceil_div(params.n, 32);

  float acc[Traits::MI][Traits::NI][4] = {};
  const auto stage_dense = [&](int stage) {
    return reinterpret_cast<float*>(shared + stage * Traits::STAGE_BYTES);
  };
  const auto stage_planes = [&](int stage) {
    return reinterpret_cast<uint32_t*>(stage_dense(stage) + Dense::SIZE);
  };
  TileLoader<Dense, Traits::THREADS> dense_loader(params.dense, n0, 0);
  int next_step = 0;
  pipeline<Traits::STAGES>(
      ceil_div(params.dense.rows, Traits::BLOCK_K),
      [&](int stage) {
        dense_loader.next(stage_dense(stage));
        const int i = threadIdx.x % WORDS;
        const int row = TRANSPOSE ? next_step * Traits::BLOCK_K + i / 2 : m0 + i;
        const int word = TRANSPOSE ? m0 / 32 + i % 2 : next_step;
        ++next_step;
        const uint32_t* plane = threadIdx.x < WORDS ? params.positive : params.negative;
        const bool inside = row < params.m && word < words;
        const int64_t from = inside ? static_cast<int64_t>(row) * words + word : 0;
        cp_async<4>(stage_planes(stage) + threadIdx.x, plane + from, inside ? 4 : 0);
      },
      [&](int, int stage) {
        const float* dense = stage_dense(stage);
        const uint32_t* positive = stage_planes(stage);
        const uint32_t* negative = positive + WORDS;
#pragma unroll
        for (int k = 0; k < Traits::BLOCK_K; k += 16) {
          uint32_t a[Traits::MI][4];
#pragma unroll
          for (int i = 0; i < Traits::MI; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = warp_m + 16 * i + lane_group() + e % 2 * 8;
              const int column = k + lane_pair() + e / 2 * 8;
              a[i][e] = bf16_signs(two_bits<TRANSPOSE>(positive, row, column),
                                   two_bits<TRANSPOSE>(negative, row, column));
            }
#pragma unroll
          for (int j = 0; j < Traits::NI; ++j) {
            float z[4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
              z[e] = dense[Dense::at(warp_n + 8 * j + lane_group(),
                                     k + lane_pair() + e % 2 + e / 2 * 8)];
#pragma unroll
            for (int part = 0; part < 3; ++part) {
              const uint32_t b0 = take_bf16(z[0], z[1]), b1 = take_bf16(z[2], z[3]);
#pragma unroll
              for (int i = 0; i < Traits::MI; ++i) mma_m16n8k16(acc[i][j], a[i], b0, b1, bf16{});
            }
          }
        }
      });

#pragma unroll
  for (int i = 0; i < Traits::MI; ++i)
#pragma unroll
    for (int j = 0; j < Traits::NI; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + warp_m + 16 * i + lane_group() + e / 2 * 8;
        const int column = n0 + warp_n + 8 * j + lane_pair() + e % 2;
        if (row < rows && column < q)
          params.out[static_cast<int64_t>(row) * q + column] = acc[i][j][e];
      }
}

template <class Traits>
Launch launch_sign_matmul(const SignMatmulParams& params, cudaStream_t stream) {
  const int rows = Traits::TRANSPOSE ? params.n : params.m;
  const dim3 grid(ceil_div(rows, Traits::BLOCK_M),
                  ceil_div(params.dense.columns, Traits::BLOCK_N));
  if (grid.x == 0 || grid.y == 0) return {};
  return launch(sign_matmul_kernel<Traits>, "sign_matmul", grid, Traits::THREADS,
                Traits::SHARED_BYTES, params, stream);
}

}  // namespace

Launch sign_matmul(const SignMatmulParams& params, cudaStream_t stream) {
  return params.transpose ? launch_sign_matmul<SignMatmulTraits<true>>(params, stream)
                          : launch_sign_matmul<SignMatmulTraits<false>>(params, stream);
}

}  // namespace lorasb
