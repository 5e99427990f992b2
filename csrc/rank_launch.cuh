// Which of the rank product's kernels runs, over how many blocks, and its launch.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "rank_product.cuh"

namespace lorasb {

// As many stages as fit into `bytes`, at most four.
template <typename T, int RANK, int BLOCK_M>
constexpr int stages_in(int bytes) {
  return std::min(4, bytes / ((BLOCK_M + RANK) * 64));
}

// 128 rows in four warps of two row tiles: every fragment of the factor is used twice.
template <typename T, int RANK, RankMode MODE>
using TallTile =
    RankProductTraits<T, RANK, 4, 1, 2, stages_in<T, RANK, 128>(48 * 1024), 2, MODE>;

// 32 rows, for small M.
template <typename T, int RANK, RankMode MODE>
using ShortTile =
    RankProductTraits<T, RANK, 2, 1, 1, stages_in<T, RANK, 32>(32 * 1024), 3, MODE>;

// 64 rows, with dropout, where random bits take more time and registers than products.
template <typename T, int RANK>
using MaskedTile = RankProductTraits<T, RANK, 4, 1, 1, stages_in<T, RANK, 64>(48 * 1024), 2,
                                     RankMode::DROPOUT>;

// Ranks too wide for the accumulators of one warp are distributed over two or more.
template <typename T, RankMode MODE>
using WideTile = RankProductTraits<T, 256, 4, 2, 1, 3, 1, MODE>;
template <typename T, RankMode MODE>
using WidestTile =
    std::conditional_t<sizeof(T) == 2, RankProductTraits<T, 512, 2, 4, 1, 2, 1, MODE>,
                       RankProductTraits<T, 512, 1, 8, 1, 2, 1, MODE>>;

// FFMA keeps more operands in registers than mma.sync, hence fewer rows in fp32.
template <int RANK, RankMode MODE>
using SinglePrecisionTile =
    RankProductTraits<float, RANK, 4, RANK == 32 ? 1 : 2, 1, 4, RANK == 32 ? 2 : 1, MODE>;

// How M, K and the layers are distributed over blocks of one kernel.
struct RankProductPlan {
  int64_t tiles;  // of rows, of all layers
  int splits;     // blocks of a tile
  double cost;

  // The cheapest number of splits. Costs are in elements that a multiprocessor reads at its share
  // of the device's bandwidth:
  //
  //     the larger of  its share of x, and of partial sums written and read in fp32
  //               and  what its blocks read, x and F, at twice that rate, from L2 mostly
  //     and a round trip to memory for each wave of blocks, and for the sums of SPLITS_AT_ONCE.
  //
  // Depends on the shape and the device alone. The rates are assumed, not measured.
  template <class Traits>
  static RankProductPlan of(int64_t M, int64_t K, int layers, int multiprocessors) {
    constexpr double ROUND_TRIP = 2048;
    const int64_t tiles = ceil_div<int64_t>(M, Traits::BLOCK_M) * layers;
    const int64_t steps = ceil_div<int64_t>(K, Traits::BLOCK_K);
    const int64_t resident = multiprocessors * Traits::BLOCKS;
    RankProductPlan best{tiles, 1, HUGE_VAL};
    for (const int64_t wanted : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
      const bool too_many = 2 * wanted > steps || tiles * (wanted - 1) >= resident;
      if (wanted > 1 && (too_many || tiles > MAX_ARRIVALS)) break;
      const int64_t own_steps = std::max<int64_t>(ceil_div(steps, wanted), 1);
      const int64_t splits = std::max<int64_t>(ceil_div(steps, own_steps), 1);
      const int64_t blocks = tiles * splits;
      const double partial_sums = splits > 1 ? 4. * splits * Traits::RANK * layers : 0;
      const double memory = M * (K + partial_sums) / multiprocessors;
      const double block = own_steps * Traits::BLOCK_K * (Traits::BLOCK_M + Traits::RANK) / 2.;
      const double blocks_of_one = ceil_div<int64_t>(blocks, multiprocessors) * block;
      const int64_t round_trips =
          ceil_div(blocks, resident) +
          (splits > 1 ? 1 + ceil_div<int64_t>(splits, Traits::SPLITS_AT_ONCE) : 0);
      const double cost = std::max(memory, blocks_of_one) + ROUND_TRIP * round_trips;
      if (cost < best.cost) best = {tiles, static_cast<int>(splits), cost};
    }
    return best;
  }

  template <class Traits>
  size_t workspace_bytes() const {
    return splits > 1 ? tiles * splits * Traits::PARTIAL * sizeof(float4) : 0;
  }
};

// Calls `function(traits, plan)` with the kernel for a rank and a shape.
template <typename T, RankMode MODE, class Function>
auto dispatch_rank(int rank, int64_t M, int64_t K, int layers, Function function) {
  const int count = multiprocessors();
  const auto only = [&](auto traits) {
    return function(traits, RankProductPlan::of<decltype(traits)>(M, K, layers, count));
  };
  // Of a rank up to 128, the kernel for many rows or that for few.
  const auto narrow = [&](auto constant) {
    constexpr int RANK = decltype(constant)::value;
    if constexpr (MODE == RankMode::DROPOUT) {
      return only(MaskedTile<T, RANK>{});
    } else {
      using Tall = TallTile<T, RANK, MODE>;
      using Short = ShortTile<T, RANK, MODE>;
      const auto tall = RankProductPlan::of<Tall>(M, K, layers, count);
      const auto low = RankProductPlan::of<Short>(M, K, layers, count);
      return low.cost < tall.cost ? function(Short{}, low) : function(Tall{}, tall);
    }
  };
  if constexpr (sizeof(T) == 4) {
    if (rank <= 32) return only(SinglePrecisionTile<32, MODE>{});
    if (rank <= 128) return only(SinglePrecisionTile<128, MODE>{});
  } else {
    if (rank <= 16) return narrow(std::integral_constant<int, 16>{});
    if (rank <= 32) return narrow(std::integral_constant<int, 32>{});
    if (rank <= 64) return narrow(std::integral_constant<int, 64>{});
    if (rank <= 96) return narrow(std::integral_constant<int, 96>{});
    if (rank <= 128) return narrow(std::integral_constant<int, 128>{});
    if (rank <= 256) return only(WideTile<T, MODE>{});
  }
  return only(WidestTile<T, MODE>{});
}

template <RankMode MODE>
size_t rank_product_workspace(DType dtype, int rank, int64_t M, int64_t K, int layers) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_rank<T, MODE>(rank, M, K, layers, [](auto traits, const auto& plan) {
      return plan.template workspace_bytes<decltype(traits)>();
    });
  });
}

template <RankMode MODE>
Launch rank_product(DType dtype, RankProductParams params, void* workspace, const char* name,
                    cudaStream_t stream) {
  const int64_t M = params.x.rows, K = params.x.columns;
  if (M == 0) return {};
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int rank = params.core[0].rows;
    return dispatch_rank<T, MODE>(rank, M, K, params.layers, [&](auto traits, const auto& plan) {
      using Traits = decltype(traits);
      params.splits = plan.splits;
      params.partials = static_cast<float4*>(workspace);
      const dim3 grid(static_cast<unsigned>(plan.tiles), plan.splits);
      return launch(rank_product_kernel<Traits>, name, grid, Traits::THREADS,
                    Traits::SHARED_BYTES, params, stream);
    });
  });
}

}  // namespace lorasb
