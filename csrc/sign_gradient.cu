// acc += (w ⊙ dy)ᵀ x, and sign((w ⊙ dy)ᵀ x) in one shot; see token_product.cu.
#include "hopper/sign_gradient.h"
#include "ops.h"
#include "token_product.h"

namespace lorasb {

Launch sign_gradient(const SignGradientParams& params, cudaStream_t stream) {
  if (hopper::takes_sign_gradient(params)) return hopper::sign_gradient(params, stream);
  TokenProductParams product{};
  product.a = params.grad_output;
  product.b = params.x;
  product.weight = params.row_weight;
  product.output = params.acc ? TokenProductParams::ADD : TokenProductParams::SIGNS;
  product.positive = params.positive;
  product.negative = params.negative;
  product.out = params.acc;
  product.out_stride = params.acc_stride;
  const char* name = params.acc ? "sign_accumulate" : "sign_gradient";
  return token_product(params.dtype, product, 1, name, stream);
}

}  // namespace lorasb
