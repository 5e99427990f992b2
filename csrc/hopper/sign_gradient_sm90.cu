// G = dyᵀ x on Hopper, added to an fp32 accumulator or reduced to its signs: one persistent launch.
//
// Both operands are contracted over tokens, their rows, and reach wgmma as they are stored. A block
// of three warpgroups holds 128×256 of G in registers over all its tokens: a warp of the first
// copies, the others multiply; see ring.cuh. Sums are added by the copy engine (TMA), each element
// once, so that the result does not depend on the order of blocks.
//
// Reads x m / 256 times and dy n / 256 times, mostly from L2; 2·M·m·n flops. Compiled for sm_90a
// alone.
#include "ring.cuh"
#include "sign_gradient.h"
#include "tensor_map.h"

namespace lorasb::hopper {
namespace {

struct Params {
  CUtensorMap dy, x, acc;
  uint32_t* positive;
  uint32_t* negative;
  int32_t m, n;
  int32_t chunks;  // of 64 tokens
  TileGrid tiles;
};

template <typename T_, bool ADD_>
struct Traits {
  using T = T_;
  static constexpr bool ADD = ADD_;
  static constexpr int THREADS = 128 + 32 * CONSUMER_WARPS;
  using Left = SwizzledTile<128, false>;
  using Right = SwizzledTile<256, false>;
  static constexpr int STAGES = 4;

  // Sums pass through shared memory in slices of 16 rows by 32 columns, two per warp in turn.
  static constexpr int SLICES = 2, SLICE_BYTES = 16 * 32 * sizeof(float);
  static constexpr int SLICES_AT = Ring<Traits>::BYTES;
  static constexpr int BARRIERS_AT =
      SLICES_AT + (ADD ? CONSUMER_WARPS * SLICES * SLICE_BYTES : 0);
  static constexpr int SHARED_BYTES = BARRIERS_AT + Ring<Traits>::BARRIER_BYTES;
};

// Adds a warp's 16 rows, whose corner is (m0, n0), to the accumulator. Slices are written to shared
// memory in the 128-byte swizzle.
template <class Traits>
__device__ inline void add_rows(const float (&sums)[128], const Params& params, uint32_t slices,
                                int m0, int n0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t slice = slices + i % Traits::SLICES * Traits::SLICE_BYTES;
    if (lane == 0) wait_stores_read<Traits::SLICES - 1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half, column = 8 * j + lane % 4 * 2;
        const uint32_t at = slice + row * 128 + ((column / 4 ^ row % 8) << 4) + column % 4 * 4;
        const float* pair = sums + 16 * i + 4 * j + 2 * half;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(pair[0]), "f"(pair[1])
                     : "memory");
      }
    fence_before_store();
    __syncwarp();
    if (lane == 0) add_box(params.acc, n0 + 32 * i, m0, slice);
  }
}

// Writes the signs of a warp's 16 rows, a word of each plane for 32 columns.
__device__ inline void store_signs(const float (&sums)[128], const Params& params, int m0,
                                   int n0) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const int words = ceil_div(params.n, 32);
  // Of the four threads that hold a row and the row 8 below, each writes one of their four words.
  const int row = m0 + lane / 4 + lane % 4 / 2 * 8;
  uint32_t* plane = lane % 2 == 0 ? params.positive : params.negative;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int which = 0; which < 4; ++which) {
      uint32_t bits = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float value = sums[16 * i + e / 2 * 4 + which / 2 * 2 + e % 2];
        const bool set = (which % 2 == 0 ? value > 0 : value < 0) || !isfinite(value);
        bits |= static_cast<uint32_t>(set) << (e / 2 * 8 + pair + e % 2);
      }
      bits |= __shfl_xor_sync(0xFFFFFFFF, bits, 1);
      bits |= __shfl_xor_sync(0xFFFFFFFF, bits, 2);
      if (which == lane % 4) word = bits;
    }
    const int column = n0 + 32 * i, inside = params.n - column;
    if (inside < 32) word &= (1u << max(inside, 0)) - 1;  // NaN in dy reaches past the last column
    if (row < params.m && inside > 0)
      plane[static_cast<int64_t>(row) * words + column / 32] = word;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    hopper_sign_gradient_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const Ring<Traits> ring{base, base + Traits::BARRIERS_AT};
  const uint32_t block = block_in_cluster();
  if (threadIdx.x == 0) {
    ring.initialize();
    publish_barriers();
  }
  cluster_barrier();

  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // the same for the compiler, too
  if (warp < 4) {
    shrink_registers_to<40>();
    if (threadIdx.x == 0) {
      ChunkLoader<Traits> loader(ring, block);
      for_each_tile<Traits>(params.tiles, block, [&](int m0, int n0) {
        for (int chunk = 0; chunk < params.chunks; ++chunk)
          loader.load(params.dy, params.x, m0, n0, chunk * CHUNK);
      });
    }
  } else {
    grow_registers_to<232>();
    Products<Traits> products(ring, threadIdx.x - 128);
    for_each_tile<Traits>(params.tiles, block, [&](int m0, int n0) {
      products.template start<CHUNK / 16>(false);
      products.add_chunks(params.chunks - 1);
      products.finish();
      const int row = m0 + 16 * (warp - 4);
      if constexpr (Traits::ADD) {
        const int slices = (warp - 4) * Traits::SLICES * Traits::SLICE_BYTES;
        add_rows<Traits>(products.sums, params, base + Traits::SLICES_AT + slices, row, n0);
      } else {
        store_signs(products.sums, params, row, n0);
      }
    });
    if (threadIdx.x % 32 == 0) wait_stores();
  }
  // No block ends while the other one may copy into it or arrive at its barriers.
  cluster_barrier();
}

// The accumulator as a matrix.
Matrix accumulator(const SignGradientParams& params) {
  Matrix acc = params.x;
  acc.data = params.acc;
  acc.stride = params.acc_stride;
  acc.rows = params.grad_output.columns;
  return acc;
}

template <class Traits>
Launch launch_sign_gradient(const SignGradientParams& gradient, cudaStream_t stream) {
  Params params{};
  params.m = gradient.grad_output.columns;
  params.n = gradient.x.columns;
  params.positive = gradient.positive;
  params.negative = gradient.negative;
  params.chunks = ceil_div(gradient.x.rows, CHUNK);
  params.tiles = tiles_of<Traits>(params.m, params.n);
  cudaError_t error =
      make_tensor_map(&params.dy, gradient.dtype, gradient.grad_output, CHUNK, 64);
  if (error == cudaSuccess)
    error = make_tensor_map(&params.x, gradient.dtype, gradient.x, CHUNK, 64);
  if (error == cudaSuccess && Traits::ADD)
    error = make_tensor_map(&params.acc, DType::fp32, accumulator(gradient), 16, 32);
  if (error != cudaSuccess) return Launch{error, "cuTensorMapEncodeTiled"};
  return launch(hopper_sign_gradient_kernel<Traits>,
                Traits::ADD ? "hopper_sign_accumulate" : "hopper_sign_gradient",
                dim3(blocks_for(params.tiles, resident_clusters())), Traits::THREADS,
                Traits::SHARED_BYTES, params, stream);
}

template <typename T>
Launch sign_gradient_of(const SignGradientParams& params, cudaStream_t stream) {
  return params.acc ? launch_sign_gradient<Traits<T, true>>(params, stream)
                    : launch_sign_gradient<Traits<T, false>>(params, stream);
}

}  // namespace

bool takes_sign_gradient(const SignGradientParams& params) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(params.acc) % 16 == 0 && params.acc_stride % 4 == 0;
  return params.dtype != DType::fp32 && !params.row_weight && describable(params.grad_output) &&
         describable(params.x) && (!params.acc || (aligned && describable(accumulator(params)))) &&
         is_hopper();
}

Launch sign_gradient(const SignGradientParams& params, cudaStream_t stream) {
  return params.dtype == DType::bf16 ? sign_gradient_of<bf16>(params, stream)
                                     : sign_gradient_of<fp16>(params, stream);
}

}  // namespace lorasb::hopper
