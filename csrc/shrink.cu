// h = drop(x) Aᵀ and p = s · h Rᵀ in one pass over x; see rank_product.cuh.
#include "rank_product.cuh"

namespace lorasb {

size_t shrink_workspace(const ShrinkParams& params) {
  return rank_product_workspace<false>(params.dtype, params.lora_A.rows, params.x.rows,
                                       params.x.columns);
}

Launch shrink(const ShrinkParams& params, cudaStream_t stream) {
  RankProductParams product{};
  product.x = params.x;
  product.factor = params.lora_A;
  product.core = params.lora_R;
  product.rank = static_cast<int>(params.lora_A.rows);
  product.scaling = params.scaling;
  product.dropout = params.dropout;
  product.first = params.h;
  product.second = params.p;
  return rank_product<false>(params.dtype, product, params.workspace, "shrink", stream);
}

}  // namespace lorasb
