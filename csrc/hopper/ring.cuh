// A persistent kernel's ring of stages in shared memory: one thread of a block starts the copies that
// fill them, two warpgroups multiply what is in them, 64 rows of the result each.
//
// A stage holds a chunk of 64 contraction indices of both operands. Two blocks form a cluster: their
// tiles of the result lie below each other, and each copies half of the right operand into both.
//
// Traits have: T, Left and Right (SwizzledTiles), STAGES.
#pragma once

#include "../common/launch.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace lorasb::hopper {

constexpr int CLUSTER = 2;
constexpr int CONSUMER_WARPS = 8;
constexpr int CHUNK = 64;

template <class Traits>
struct Ring {
  static constexpr int STAGE_BYTES = Traits::Left::BYTES + Traits::Right::BYTES;
  static constexpr int BYTES = Traits::STAGES * STAGE_BYTES;
  static constexpr int BARRIER_BYTES = 2 * Traits::STAGES * Barrier::BYTES;

  uint32_t stages, barriers;  // in shared memory; the stages at a multiple of 1024

  __device__ uint32_t left(int stage) const { return stages + stage * STAGE_BYTES; }
  __device__ uint32_t right(int stage) const { return left(stage) + Traits::Left::BYTES; }
  __device__ Barrier full(int stage) const { return {barriers + Barrier::BYTES * stage}; }
  __device__ Barrier empty(int stage) const { return full(Traits::STAGES + stage); }

  // By one thread; `publish_barriers` and a cluster barrier follow.
  __device__ void initialize() const {
    for (int stage = 0; stage < Traits::STAGES; ++stage) {
      full(stage).initialize(1);
      empty(stage).initialize(CONSUMER_WARPS * CLUSTER);
    }
  }
};

// Starts the copies of OUTER outer indices of an operand from `outer` on and of a chunk from k on.
// With BLOCKS they go to all blocks of the cluster that have a bit there.
template <bool K_CONTIGUOUS, int OUTER, uint16_t BLOCKS = 0>
__device__ inline void load_operand(uint32_t shared, const CUtensorMap& map, int outer, int k,
                                    Barrier barrier) {
  constexpr int PER_BOX = K_CONTIGUOUS ? OUTER : 64;
#pragma unroll
  for (int i = 0; i < OUTER / PER_BOX; ++i) {
    const uint32_t to = shared + i * PER_BOX * CHUNK * 2;
    const int column = K_CONTIGUOUS ? k : outer + i * PER_BOX, row = K_CONTIGUOUS ? outer : k;
    if constexpr (BLOCKS)
      load_box_into(BLOCKS, to, map, column, row, barrier);
    else
      load_box(to, map, column, row, barrier);
  }
}

// The side that copies.
template <class Traits>
class ChunkLoader {
 public:
  __device__ ChunkLoader(Ring<Traits> ring, uint32_t block) : ring_(ring), block_(block) {}

  // Waits for the next stage to be empty and starts copying the chunk from k on: this block's rows
  // m0… of the left operand, and its half of the cluster's rows n0… of the right one.
  __device__ void load(const CUtensorMap& left, const CUtensorMap& right, int m0, int n0, int k) {
    using Left = typename Traits::Left;
    using Right = typename Traits::Right;
    constexpr int PART = Right::OUTER / CLUSTER;
    const Barrier full = ring_.full(at_.stage);
    ring_.empty(at_.stage).wait(at_.parity ^ 1);
    full.arrive_and_expect(Ring<Traits>::STAGE_BYTES);
    load_operand<Left::K_CONTIGUOUS, Left::OUTER>(ring_.left(at_.stage), left, m0, k, full);
    const uint32_t half = ring_.right(at_.stage) + block_ * (Right::BYTES / CLUSTER);
    load_operand<Right::K_CONTIGUOUS, PART, (1 << CLUSTER) - 1>(half, right, n0 + block_ * PART, k,
                                                                full);
    at_.advance();
  }

 private:
  Ring<Traits> ring_;
  uint32_t block_;
  RingPosition<Traits::STAGES> at_;
};

// The side that multiplies, in each thread of the two warpgroups.
template <class Traits>
class Products {
 public:
  static constexpr int COUNT = Traits::Right::OUTER / 2;
  float sums[COUNT];  // as `wgmma.cuh` lays them out

  __device__ Products(Ring<Traits> ring, int thread)
      : ring_(ring),
        left_(Left::descriptor(ring.left(0) + thread / 128 * (Left::BYTES / 2))),
        right_(Right::descriptor(ring.right(0))) {}

  // Starts the products of the next chunk's first STEPS · 16 contraction indices; they overwrite the
  // sums unless `add`.
  template <int STEPS>
  __device__ void start(bool add) {
    ring_.full(at_.stage).wait(at_.parity);
    pin(sums);
    fence_products();
    const int offset = at_.stage * Ring<Traits>::STAGE_BYTES;
    const uint64_t a = Left::advanced(left_, offset), b = Right::advanced(right_, offset);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      multiply_16<typename Traits::T, Left, Right>(sums, a + i * Left::NEXT_16,
                                                   b + i * Right::NEXT_16, add || i > 0);
    commit_products();
    previous_ = at_.stage;
    at_.advance();
  }

  // Adds whole chunks after others: each is started before those of the one before are complete.
  __device__ void add_chunks(int count) {
#pragma unroll 1
    for (int chunk = 0; chunk < count; ++chunk) {
      const int done = previous_;
      start<CHUNK / 16>(true);
      wait_products<1>();
      pin(sums);
      release(done);
    }
  }

  // Waits until the sums are complete.
  __device__ void wait() {
    wait_products<0>();
    pin(sums);
  }

  // The same, and returns the last stage.
  __device__ void finish() {
    wait();
    release(previous_);
  }

 private:
  using Left = typename Traits::Left;
  using Right = typename Traits::Right;

  // A warp speaks for its own reads only, hence an arrival per warp, in each block whose copies
  // this stage receives.
  __device__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER) ring_.empty(stage).arrive_in(lane);
  }

  Ring<Traits> ring_;
  uint64_t left_, right_;
  RingPosition<Traits::STAGES> at_;
  int previous_ = 0;  // the stage before, still read by products in flight
};

// Tiles of the result: rows of the height of a cluster, and columns.
struct TileGrid {
  int32_t rows, columns;
};

// Calls function(m0, n0) with the corner of each of this block's tiles.
//
// Clusters take tiles in turn, in an order in which concurrent ones share operands in L2: eight
// rows of tiles at a time, column by column.
template <class Traits, class Function>
__device__ inline void for_each_tile(TileGrid tiles, uint32_t block, Function function) {
  constexpr int GROUP = 8;
  for (int i = blockIdx.x / CLUSTER; i < tiles.rows * tiles.columns; i += gridDim.x / CLUSTER) {
    const int in_group = GROUP * tiles.columns;
    const int first = i / in_group * GROUP;
    const int height = min(GROUP, tiles.rows - first);
    const int inner = i % in_group;
    const int row = (first + inner % height) * CLUSTER + block;
    function(row * Traits::Left::OUTER, inner / height * Traits::Right::OUTER);
  }
}

// The tiles of a result [M, N], and how many blocks work on them.
template <class Traits>
TileGrid tiles_of(int M, int N) {
  return {ceil_div(M, CLUSTER * Traits::Left::OUTER), ceil_div(N, Traits::Right::OUTER)};
}

inline int blocks_for(TileGrid tiles, int clusters) {
  const int64_t count = static_cast<int64_t>(tiles.rows) * tiles.columns;
  return static_cast<int>(count < clusters ? count : clusters) * CLUSTER;
}

// Clusters that the current device runs at a time.
inline int resident_clusters() {
  const int clusters = multiprocessors() / CLUSTER;
  return clusters < 1 ? 1 : clusters;
}

}  // namespace lorasb::hopper
