// y = x Wᵀ + drop(p Bᵀ) + bias on Hopper: one persistent launch whose loads never pause.
//
// Two pairs of operands pass through one ring of stages (ring.cuh), for each tile of y first chunks
// of (p, B), then of (x, W). In a block of three warpgroups
//
//     warp 0 of the first starts the copies (TMA), up to STAGES chunks ahead, also into the next
//     tile of y; the other three compute the dropout mask of the next tile;
//     the second and third multiply (wgmma), 64 rows each, and store y.
//
// Reads x N / BLOCK_N times and W M / 256 times, mostly from L2; writes y once; 2·M·N·(K + r) flops.
// Compiled for sm_90a alone.
#include "../common/dropout.cuh"
#include "../common/launch.cuh"
#include "expand.h"
#include "ring.cuh"
#include "tensor_map.h"

namespace lorasb::hopper {
namespace {

struct Params {
  CUtensorMap x, weight, p, factor, y;
  const void* bias;
  Dropout dropout;
  int32_t N;
  int32_t first_steps;  // steps of 16 in the first chunk of the rank, 1 to 4
  int32_t rank_chunks, k_chunks;
  TileGrid tiles;
};

template <typename T_, bool TRANSPOSED_, int BLOCK_N_>
struct Traits {
  using T = T_;
  static constexpr bool TRANSPOSED = TRANSPOSED_;
  static constexpr int MASK_WARPS = 3;
  static constexpr int THREADS = 32 * (1 + MASK_WARPS + CONSUMER_WARPS);
  static constexpr int BLOCK_M = 128, BLOCK_N = BLOCK_N_;
  using Left = SwizzledTile<BLOCK_M, true>;
  using Right = SwizzledTile<BLOCK_N, !TRANSPOSED>;
  static constexpr int STAGES = BLOCK_N == 256 ? 4 : 6;

  // Y passes through shared memory in slices of 16 rows by 32 columns, three per warp in turn.
  static constexpr int SLICE_COLUMNS = 32, SLICES = 3;
  static constexpr int SLICE_BYTES = 16 * SLICE_COLUMNS * 2;
  // The dropout mask has a bit for each sum.
  static constexpr int SUMS = BLOCK_N / 2;  // per thread
  static constexpr int MASK_WORDS = SUMS / 32 * 32 * CONSUMER_WARPS;

  // Offsets in shared memory.
  static constexpr int Y_AT = STAGES * (Left::BYTES + Right::BYTES);
  static constexpr int MASK_AT = Y_AT + CONSUMER_WARPS * SLICES * SLICE_BYTES;
  static constexpr int BARRIERS_AT = MASK_AT + 4 * MASK_WORDS;
  static constexpr int SHARED_BYTES = BARRIERS_AT + Barrier::BYTES * (2 * STAGES + 2);
};

// The shared memory of a block.
template <class Traits>
struct Shared {
  unsigned char* memory;
  uint32_t base;  // its address

  __device__ Ring<Traits> ring() const { return {base, base + Traits::BARRIERS_AT}; }
  __device__ uint32_t slice(int warp, int index) const {
    return base + Traits::Y_AT + (warp * Traits::SLICES + index) * Traits::SLICE_BYTES;
  }
  __device__ uint32_t* mask() const {
    return reinterpret_cast<uint32_t*>(memory + Traits::MASK_AT);
  }
  __device__ Barrier mask_full() const {
    return {base + Traits::BARRIERS_AT + Ring<Traits>::BARRIER_BYTES};
  }
  __device__ Barrier mask_empty() const { return {mask_full().address + Barrier::BYTES}; }
};

// The part of the warp that loads, run by one thread.
template <class Traits>
__device__ inline void load_tiles(const Params& params, Shared<Traits> shared, uint32_t block) {
  ChunkLoader<Traits> loader(shared.ring(), block);
  for_each_tile<Traits>(params.tiles, block, [&](int m0, int n0) {
    for (int chunk = 0; chunk < params.rank_chunks; ++chunk) {
      // What a short first chunk copies past its steps comes again with the second.
      const int skipped = CHUNK - 16 * params.first_steps;
      loader.load(params.p, params.factor, m0, n0, chunk == 0 ? 0 : chunk * CHUNK - skipped);
    }
    for (int chunk = 0; chunk < params.k_chunks; ++chunk)
      loader.load(params.x, params.weight, m0, n0, chunk * CHUNK);
  });
}

// The part of the warps that compute dropout masks, `thread` counted over them.
//
// Bit 4j + e of a consumer's word `part` is for its accumulator c[32 · part + 4j + e]. The words of
// one part are stored together, in the order of consumers.
template <class Traits>
__device__ inline void make_masks(const Params& params, Shared<Traits> shared, uint32_t block,
                                  int thread) {
  constexpr int CONSUMERS = 32 * CONSUMER_WARPS;
  const int64_t seed = *params.dropout.seed;
  const uint32_t threshold = params.dropout.threshold;
  uint32_t parity = 0;
  for_each_tile<Traits>(params.tiles, block, [&](int m0, int n0) {
    shared.mask_empty().wait(parity ^ 1);
    for (int word = thread; word < Traits::MASK_WORDS; word += 32 * Traits::MASK_WARPS) {
      const int consumer = word % CONSUMERS, lane = consumer % 32;
      const int row = m0 + consumer / 32 * 16 + lane / 4;
      const int column = n0 + word / CONSUMERS * 64 + lane % 4 * 2;
      const uint64_t corner = static_cast<uint64_t>(row) * params.N + column;
      uint32_t bits = 0;
#pragma unroll 1
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint64_t element = corner + 8 * j + e % 2 + e / 2 * 8 * uint64_t(params.N);
          bits |= uint32_t(random_bits(element, seed) >= threshold) << (4 * j + e);
        }
      shared.mask()[word] = bits;
    }
    __syncwarp();
    if (thread % 32 == 0) shared.mask_full().arrive();
    parity ^= 1;
  });
}

// Adds the bias to a thread's accumulators, whose first column is `column`. N is a multiple of 8.
template <typename T, int SUMS>
struct Bias {
  uint32_t pairs[SUMS / 4];

  __device__ void load(const void* bias, int column, int N) {
#pragma unroll
    for (int j = 0; j < SUMS / 4; ++j)
      pairs[j] = column + 8 * j < N
                     ? *reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias) + column +
                                                          8 * j)
                     : 0;
  }

  __device__ void add_to(float (&acc)[SUMS]) const {
#pragma unroll
    for (int j = 0; j < SUMS / 4; ++j) {
      const float2 values = unpack(pairs[j], T{});
      acc[4 * j] += values.x, acc[4 * j + 1] += values.y;
      acc[4 * j + 2] += values.x, acc[4 * j + 3] += values.y;
    }
  }
};

// Stores a warp's 16 rows of the tile, whose corner is (m0, n0), from its accumulators.
//
// Slices are written to shared memory in the 64-byte swizzle: `used` counts them over all tiles.
template <class Traits>
__device__ inline void store_rows(const float (&acc)[Traits::SUMS], const CUtensorMap& y,
                                  Shared<Traits> shared, int warp, int m0, int n0, int& used) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 16;
#pragma unroll
  for (int i = 0; i < Traits::BLOCK_N / Traits::SLICE_COLUMNS; ++i) {
    const uint32_t slice = shared.slice(warp, used);
    if (lane == 0) wait_stores_read<Traits::SLICES - 1>();
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 16 columns, four matrices of 8×8
      const float* c = acc + 16 * i + 8 * half;
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[e] = pack(c[2 * e], c[2 * e + 1], typename Traits::T{});
      const int chunk = (2 * half + lane / 16) ^ (row / 2 % 4);
      store_matrices(slice + row * 64 + chunk * 16, pairs);
    }
    fence_before_store();
    __syncwarp();
    if (lane == 0) store_box(y, n0 + i * Traits::SLICE_COLUMNS, m0, slice);
    if (++used == Traits::SLICES) used = 0;
  }
}

// The part of the warps that multiply, `thread` counted over them.
template <class Traits>
__device__ inline void multiply_tiles(const Params& params, Shared<Traits> shared, uint32_t block,
                                      int thread) {
  const int warp = thread / 32, lane = thread % 32;
  Products<Traits> products(shared.ring(), thread);
  int used_slices = 0;
  uint32_t mask_parity = 0;
  for_each_tile<Traits>(params.tiles, block, [&](int m0, int n0) {
    switch (params.first_steps) {
      case 1: products.template start<1>(false); break;
      case 2: products.template start<2>(false); break;
      case 3: products.template start<3>(false); break;
      default: products.template start<4>(false);
    }
    products.add_chunks(params.rank_chunks - 1);
    if (params.dropout.seed) {
      products.wait();
      shared.mask_full().wait(mask_parity);
      mask_parity ^= 1;
#pragma unroll
      for (int part = 0; part < Traits::SUMS / 32; ++part) {
        const uint32_t bits = shared.mask()[32 * CONSUMER_WARPS * part + thread];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          float& sum = products.sums[32 * part + i];
          sum = bits >> i & 1 ? sum * params.dropout.scale : 0.f;
        }
      }
      __syncwarp();
      if (lane == 0) shared.mask_empty().arrive();
    }
    products.add_chunks(params.k_chunks);

    Bias<typename Traits::T, Traits::SUMS> bias;  // loaded while the last products are in flight
    if (params.bias) bias.load(params.bias, n0 + lane % 4 * 2, params.N);
    products.finish();
    if (params.bias) bias.add_to(products.sums);
    store_rows<Traits>(products.sums, params.y, shared, warp, m0 + 16 * warp, n0, used_slices);
  });
  if (lane == 0) wait_stores();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    hopper_expand_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared<Traits> shared{memory, shared_address(memory)};
  const uint32_t block = block_in_cluster();
  if (threadIdx.x == 0) {
    shared.ring().initialize();
    shared.mask_full().initialize(Traits::MASK_WARPS);
    shared.mask_empty().initialize(CONSUMER_WARPS);
    publish_barriers();
  }
  cluster_barrier();

  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // the same for the compiler, too
  if (warp < 1 + Traits::MASK_WARPS) {
    shrink_registers_to<56>();  // the masks need more than the 40 that copying does
    if (threadIdx.x == 0)
      load_tiles(params, shared, block);
    else if (warp > 0 && params.dropout.seed)
      make_masks(params, shared, block, threadIdx.x - 32);
  } else {
    grow_registers_to<224>();
    multiply_tiles(params, shared, block, threadIdx.x - 128);
  }
  // No block ends while the other one may copy into it or arrive at its barriers.
  cluster_barrier();
}

// The runs of a device that tiles of this width need, in columns of y.
template <class Traits>
int64_t cost_of(int M, int N) {
  const TileGrid tiles = tiles_of<Traits>(M, N);
  const int64_t count = static_cast<int64_t>(tiles.rows) * tiles.columns;
  return ceil_div<int64_t>(count, resident_clusters()) * Traits::BLOCK_N;
}

template <class Traits>
Launch launch_expand(const ExpandParams& expand, cudaStream_t stream) {
  constexpr int BOX = Traits::TRANSPOSED ? 64 : Traits::BLOCK_N / CLUSTER;
  const Matrix& weight = expand.weight.matrix;
  const int M = expand.x.rows, r = expand.p.columns;
  const int N = Traits::TRANSPOSED ? weight.columns : weight.rows;
  const Matrix y{expand.y, N, M, N};

  Params params{};
  const auto map = [&](CUtensorMap& map, const Matrix& matrix, int rows, int columns) {
    return make_tensor_map(&map, expand.dtype, matrix, rows, columns);
  };
  for (const cudaError_t error :
       {map(params.x, expand.x, Traits::BLOCK_M, CHUNK),
        map(params.p, expand.p, Traits::BLOCK_M, CHUNK),
        map(params.weight, weight, BOX, CHUNK),
        map(params.factor, expand.factor.matrix, BOX, CHUNK),
        map(params.y, y, 16, Traits::SLICE_COLUMNS)})
    if (error != cudaSuccess) return Launch{error, "cuTensorMapEncodeTiled"};
  params.bias = expand.bias;
  params.dropout = expand.dropout;
  params.N = N;
  params.rank_chunks = ceil_div(r, CHUNK);
  params.first_steps = ceil_div(r, 16) - (params.rank_chunks - 1) * (CHUNK / 16);
  params.k_chunks = ceil_div(expand.x.columns, CHUNK);
  params.tiles = tiles_of<Traits>(M, N);
  const dim3 grid(blocks_for(params.tiles, resident_clusters()));
  return launch(hopper_expand_kernel<Traits>, "hopper_expand", grid, Traits::THREADS,
                Traits::SHARED_BYTES, params, stream);
}

template <typename T, bool TRANSPOSED>
Launch expand_layout(const ExpandParams& params, cudaStream_t stream) {
  using Wide = Traits<T, TRANSPOSED, 256>;
  using Narrow = Traits<T, TRANSPOSED, 128>;
  const Matrix& weight = params.weight.matrix;
  const int M = params.x.rows, N = TRANSPOSED ? weight.columns : weight.rows;
  // A narrow tile reads more per product: it has to save more than it costs.
  const bool narrow = 8 * cost_of<Wide>(M, N) > 9 * cost_of<Narrow>(M, N);
  return narrow ? launch_expand<Narrow>(params, stream) : launch_expand<Wide>(params, stream);
}

}  // namespace

bool takes_expand(const ExpandParams& params) {
  const Matrix& weight = params.weight.matrix;
  const int N = params.weight.transposed ? weight.columns : weight.rows;
  return params.dtype != DType::fp32 && N % 8 == 0 && describable(params.x) &&
         describable(weight) && describable(params.p) && describable(params.factor.matrix) &&
         reinterpret_cast<uintptr_t>(params.bias) % 4 == 0 && is_hopper();
}

Launch expand(const ExpandParams& params, cudaStream_t stream) {
  const bool transposed = params.weight.transposed;
  if (params.dtype == DType::bf16)
    return transposed ? expand_layout<bf16, true>(params, stream)
                      : expand_layout<bf16, false>(params, stream);
  return transposed ? expand_layout<fp16, true>(params, stream)
                    : expand_layout<fp16, false>(params, stream);
}

}  // namespace lorasb::hopper
