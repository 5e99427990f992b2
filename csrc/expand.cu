// y = x Wᵀ + drop(p Bᵀ) + bias: one product whose contraction runs over the rank, then over K.
//
// The second term comes first, so that dropout can be applied to it while nothing else is in the
// accumulators. Reads x, W, p, B, writes y once; 2·M·N·(K + r) flops. With K = 0 it is the second
// term alone, and y is only written.
//
// A plain mma.sync product, which cannot reach the rate of wgmma. On Hopper hopper/expand_sm90.cu
// replaces it where the operands allow; `ops/expand.py` says where the frozen product is left to
// cuBLAS.
#include "common/dropout.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/stores.cuh"
#include "hopper/expand.h"

namespace lorasb {
namespace {

template <typename T_, bool TRANSPOSED_, int BLOCK_M_, int BLOCK_N_, int WARPS_M_, int WARPS_N_,
          int STAGES_>
struct ExpandTraits {
  using T = T_;
  static constexpr bool TRANSPOSED = TRANSPOSED_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr int BLOCK_K = 64 / sizeof(T);
  static constexpr int WARPS_N = WARPS_N_;
  static constexpr int THREADS = 32 * WARPS_M_ * WARPS_N_;
  static constexpr int STAGES = STAGES_;
  static constexpr int MI = BLOCK_M / WARPS_M_ / 16, NI = BLOCK_N / WARPS_N_ / 8;
  // Two blocks of the large 16-bit tile share an sm_86 multiprocessor, at 48 KB and 128
  // registers per thread.
  static constexpr int MIN_BLOCKS = sizeof(T) == 2 ? 2 : 1;

  using X = Tile<T, BLOCK_M, BLOCK_K, true>;
  using Weight = Tile<T, BLOCK_N, BLOCK_K, !TRANSPOSED>;
  using Result = ResultTile<T, BLOCK_M, BLOCK_N>;
  static constexpr int STAGE_BYTES = X::BYTES + Weight::BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(Result::BYTES <= SHARED_BYTES);
};

// FFMA keeps more operands in registers than mma.sync, hence a smaller tile in fp32.
template <typename T, bool TRANSPOSED>
using LargeTile = std::conditional_t<sizeof(T) == 2, ExpandTraits<T, TRANSPOSED, 128, 128, 2, 2, 3>,
                                     ExpandTraits<T, TRANSPOSED, 128, 64, 4, 2, 3>>;
template <typename T, bool TRANSPOSED>
using SmallTile = ExpandTraits<T, TRANSPOSED, 32, 64, 1, 4, 4>;

// Tiles in an order in which concurrent blocks share operands in L2: eight rows of tiles at a time,
// column by column.
__device__ inline int2 tile_of_block(int block, int rows, int columns) {
  constexpr int GROUP = 8;
  const int in_group = GROUP * columns;
  const int first = block / in_group * GROUP;
  const int height = min(GROUP, rows - first);
  const int inner = block % in_group;
  return make_int2(first + inner % height, inner / height);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::MIN_BLOCKS)
    expand_kernel(const __grid_constant__ ExpandParams params) {
  using T = typename Traits::T;
  using X = typename Traits::X;
  using Weight = typename Traits::Weight;
  constexpr int THREADS = Traits::THREADS, BLOCK_K = Traits::BLOCK_K;
  extern __shared__ __align__(128) unsigned char shared[];

  const int M = params.x.rows;
  const int N = Traits::TRANSPOSED ? params.weight.matrix.columns : params.weight.matrix.rows;
  const int2 tile = tile_of_block(blockIdx.x, ceil_div(M, Traits::BLOCK_M),
                                  ceil_div(N, Traits::BLOCK_N));
  const int m0 = tile.x * Traits::BLOCK_M, n0 = tile.y * Traits::BLOCK_N;
  const int warp = threadIdx.x / 32;
  const int warp_m = warp / Traits::WARPS_N * 16 * Traits::MI;
  const int warp_n = warp % Traits::WARPS_N * 8 * Traits::NI;
  float acc[Traits::MI][Traits::NI][4] = {};
  // Calls function(row, column, low, high) for each pair of neighbours in the accumulators;
  // row and column count from the corner of the tile.
  const auto for_each_pair = [&](auto function) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::MI; ++i)
#pragma unroll
      for (int j = 0; j < Traits::NI; ++j)
        function(warp_m + 8 * i + lane_group(), warp_n + 8 * j + lane_pair(),
                 acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
  };

  const auto stage_x = [&](int stage) {
    return reinterpret_cast<T*>(shared + stage * Traits::STAGE_BYTES);
  };
  const auto multiply = [&](const Matrix& left, const Matrix& right) {
    TileLoader<X, THREADS> x_loader(left, m0, 0);
    TileLoader<Weight, THREADS> weight_loader(right, n0, 0);
    pipeline<Traits::STAGES>(
        ceil_div(left.columns, BLOCK_K),
        [&](int stage) {
          x_loader.next(stage_x(stage));
          weight_loader.next(stage_x(stage) + X::SIZE);
        },
        [&](int, int stage) {
          warp_multiply<X, Weight>(acc, stage_x(stage), stage_x(stage) + X::SIZE, warp_m, warp_n);
        });
  };
  // The mask first, as one bit for each accumulator: next to these its computation would spill.
  constexpr int ELEMENTS = 4 * Traits::MI * Traits::NI, WORDS = ceil_div(ELEMENTS, 32);
  uint32_t kept[WORDS] = {};
  if (params.dropout.seed) {
    const int64_t seed = *params.dropout.seed;
#pragma unroll
    for (int word = 0; word < WORDS; ++word)
#pragma unroll 1
      for (int bit = 0; bit < min(32, ELEMENTS); bit += 2) {
        const int pair = 16 * word + bit / 2;
        const uint64_t row = m0 + warp_m + pair / Traits::NI * 8 + lane_group();
        const int column = n0 + warp_n + pair % Traits::NI * 8 + lane_pair();
        const uint64_t counter = row * N + column;
        const uint32_t threshold = params.dropout.threshold;
        kept[word] |= static_cast<uint32_t>(random_bits(counter, seed) >= threshold) << bit |
                      static_cast<uint32_t>(random_bits(counter + 1, seed) >= threshold)
                          << (bit + 1);
      }
  }
  multiply(params.p, params.factor.matrix);
  if (params.dropout.seed) {
    int element = 0;
    for_each_pair([&](int, int, float& low, float& high) {
      const uint32_t bits = kept[element / 32] >> element % 32;
      low = bits & 1 ? low * params.dropout.scale : 0.f;
      high = bits & 2 ? high * params.dropout.scale : 0.f;
      element += 2;
    });
  }
  multiply(params.x, params.weight.matrix);

  T* result = reinterpret_cast<T*>(shared);
  const T* bias = static_cast<const T*>(params.bias);
  for_each_pair([&](int row, int column, float low, float high) {
    if (bias) {
      low += to_float(bias[min(n0 + column, N - 1)]);
      high += to_float(bias[min(n0 + column + 1, N - 1)]);
    }
    Traits::Result::put(result, row, column, low, high);
  });
  __syncthreads();
  T* y = static_cast<T*>(params.y) + static_cast<int64_t>(m0) * N + n0;
  Traits::Result::template store<THREADS>(result, y, N, M - m0, N - n0);
}

template <class Traits>
int64_t tiles_of(int M, int N) {
  return ceil_div<int64_t>(M, Traits::BLOCK_M) * ceil_div<int64_t>(N, Traits::BLOCK_N);
}

template <class Traits>
Launch launch_expand(const ExpandParams& params, int64_t tiles, cudaStream_t stream) {
  return launch(expand_kernel<Traits>, "expand", dim3(static_cast<unsigned>(tiles)),
                Traits::THREADS, Traits::SHARED_BYTES, params, stream);
}

// Large tiles re-read less, but are used only if they fill the device.
template <typename T, bool TRANSPOSED>
Launch expand_layout(const ExpandParams& params, cudaStream_t stream) {
  using Large = LargeTile<T, TRANSPOSED>;
  using Small = SmallTile<T, TRANSPOSED>;
  const Matrix& weight = params.weight.matrix;
  const int M = params.x.rows, N = TRANSPOSED ? weight.columns : weight.rows;
  if (M == 0 || N == 0) return {};
  const int64_t large = tiles_of<Large>(M, N);
  return large < multiprocessors() ? launch_expand<Small>(params, tiles_of<Small>(M, N), stream)
                                   : launch_expand<Large>(params, large, stream);
}

}  // namespace

Launch expand(const ExpandParams& params, cudaStream_t stream) {
  if (hopper::takes_expand(params)) return hopper::expand(params, stream);
  return dispatch(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return params.weight.transposed ? expand_layout<T, true>(params, stream)
                                    : expand_layout<T, false>(params, stream);
  });
}

}  // namespace lorasb
