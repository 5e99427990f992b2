// h = drop(x) Aᵀ and p = s · h Rᵀ in one pass over x; see rank_product.h.
#include <algorithm>
#include <type_traits>

#include "rank_product.h"

namespace lorasb {
namespace {

// Calls `function(mode)`, a constant, with what the operands need.
template <class Function>
auto with_mode(const ShrinkParams& params, Function function) {
  using Mode = RankMode;
  if (params.dropout.seed) return function(std::integral_constant<Mode, Mode::DROPOUT>{});
  return params.transposed ? function(std::integral_constant<Mode, Mode::BACKWARD>{})
                           : function(std::integral_constant<Mode, Mode::FORWARD>{});
}

}  // namespace

size_t shrink_workspace(const ShrinkParams& params) {
  return with_mode(params, [&](auto mode) {
    return rank_product_workspace<mode()>(params.dtype, params.lora_R[0].rows, params.x.rows,
                                          params.x.columns, params.layers);
  });
}

Launch shrink(const ShrinkParams& params, cudaStream_t stream) {
  RankProductParams product{};
  product.x = params.x;
  product.layers = params.layers;
  std::copy_n(params.lora_A, MAX_LAYERS, product.factor);
  std::copy_n(params.lora_R, MAX_LAYERS, product.core);
  product.scaling = params.scaling;
  product.dropout = params.dropout;
  product.first = params.h;
  product.first_stride = params.lora_R[0].rows;
  product.second = params.p;
  product.arrivals = params.arrivals;
  return with_mode(params, [&](auto mode) {
    return rank_product<mode()>(params.dtype, product, params.workspace, "shrink", stream);
  });
}

}  // namespace lorasb
