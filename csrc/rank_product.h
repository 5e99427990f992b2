// A long product onto the rank, and the core applied to it before it is rounded:
//
//     first  = drop(x) F      [M, r]    F = Aᵀ (shrink) or B (core_backward)
//     second = s · first C    [M, r]    C = Rᵀ           or R
//
// for one layer, or several that read the same x.
#pragma once

#include "ops.h"

namespace lorasb {

// FORWARD and DROPOUT take F and C transposed, as the contiguous A and R; BACKWARD as they are.
enum class RankMode { FORWARD, DROPOUT, BACKWARD };

struct RankProductParams {
  Matrix x;                   // [M, K]
  int32_t layers;
  Matrix factor[MAX_LAYERS];  // [r, K], or [K, r] in BACKWARD
  Matrix core[MAX_LAYERS];    // [r, r] fp32, by aligned rows that are zero from r on
  float scaling;
  Dropout dropout;
  void* first;                // [layers, M, first_stride], zero from column r on
  int32_t first_stride;
  void* second;               // [layers, M, r] contiguous
  int32_t splits;
  float4* partials;
  unsigned* arrivals;         // one per row tile and layer, zero before and after
};

template <RankMode MODE>
size_t rank_product_workspace(DType dtype, int rank, int64_t M, int64_t K, int layers);

// Launches the product. The number of splits and the partial sums, in `workspace`, are filled in.
template <RankMode MODE>
Launch rank_product(DType dtype, RankProductParams params, void* workspace, const char* name,
                    cudaStream_t stream);

}  // namespace lorasb
