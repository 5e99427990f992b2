// Products contracted over tokens, shared by the weight gradients and the r×r gradient.
#pragma once

#include "ops.h"

namespace lorasb {

// G = (w ⊙ a)ᵀ b, [m, n] in fp32.
struct TokenProductParams {
  Matrix a, b;          // [M, m], [M, n]
  const float* weight;  // [M], or null for 1 each

  // What becomes of G: its signs, a slice of partial sums, or an addition to `out`.
  enum Output : int32_t { SIGNS, PARTIAL, ADD } output;
  uint32_t* positive;   // SIGNS: [m, ceil(n/32)]
  uint32_t* negative;
  float* out;           // ADD: [m, n]; PARTIAL: [slices, m, n], the tokens split into slices
  int64_t out_stride;
};

// Slices of tokens that fill the device with blocks of at least four steps.
int token_slices(DType dtype, int64_t tokens, int64_t m, int64_t n);

// `name` is that of the operation, for error messages.
Launch token_product(DType dtype, const TokenProductParams& params, int slices, const char* name,
                     cudaStream_t stream);

}  // namespace lorasb
