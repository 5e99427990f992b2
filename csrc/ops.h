// The operations of the extension, as plain structs and functions: no torch header.
//
// Each operation is `Launch op(const OpParams&, cudaStream_t)`. It launches on the current device
// without synchronizing, and reports what it launched. Operations that need scratch memory say
// how much with `op_workspace(params)`; its contents on entry do not matter.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lorasb {

enum class DType : int32_t { fp16, bf16, fp32 };

inline int element_size(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

// A row-major matrix: its last dimension is contiguous.
struct Matrix {
  const void* data;
  int64_t stride;      // elements from one row to the next
  int32_t rows, columns;
  int32_t copy_bytes;  // by `copy_bytes`, for all rows
};

// The widest copy for addresses that are multiples of `alignment` bytes: 16, 4, or an element.
inline int32_t copy_bytes(uint64_t alignment) {
  return alignment % 16 == 0 ? 16 : alignment % 4 == 0 ? 4 : 2;
}

// An operand [rows, columns] of which either dimension is contiguous. A matrix whose first
// dimension is contiguous is kept as its transpose.
struct Operand {
  Matrix matrix;
  bool transposed;
};

struct Dropout {
  const int64_t* seed;  // null without dropout
  uint32_t threshold;   // an element is kept when its random bits are at least this
  float scale;          // 1 / (1 - p)
};

// The last kernel an operation launched, for the error message when it failed.
struct Launch {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
  dim3 grid{0, 0, 0};
  size_t shared_bytes = 0;
};

// h = drop(x) Aᵀ, p = s · h Rᵀ.
struct ShrinkParams {
  DType dtype;
  Matrix x;         // [M, n]
  Matrix lora_A;    // [r, n]
  Matrix lora_R;    // [r, r] fp32
  float scaling;
  Dropout dropout;
  void* h;          // [M, r] contiguous
  void* p;          // [M, r] contiguous
  void* workspace;
};
size_t shrink_workspace(const ShrinkParams& params);
Launch shrink(const ShrinkParams& params, cudaStream_t stream);

// g = dy B, q = s · g R, dR = s · gᵀ h.
struct CoreBackwardParams {
  DType dtype;
  Matrix dy;        // [M, m]
  Matrix h;         // [M, r]
  Matrix lora_B;    // [m, r]
  Matrix lora_R;    // [r, r] fp32
  float scaling;
  void* q;          // [M, r] contiguous
  float* dR;        // [r, r] contiguous
  void* workspace;
};
size_t core_backward_workspace(const CoreBackwardParams& params);
Launch core_backward(const CoreBackwardParams& params, cudaStream_t stream);

// y = x weightᵀ + drop(p factorᵀ) + bias.
struct ExpandParams {
  DType dtype;
  Matrix x;         // [M, K]
  Operand weight;   // [N, K]
  Matrix p;         // [M, r]
  Operand factor;   // [N, r], contiguous in the same dimension as weight
  const void* bias; // [N] or null
  Dropout dropout;
  void* y;          // [M, N] contiguous
};
Launch expand(const ExpandParams& params, cudaStream_t stream);

// Whether copies of p and factor with rows at multiples of 16 bytes would let `expand` take its
// kernel for Hopper.
bool expand_wants_aligned_rank(const ExpandParams& params);

// G = (w ⊙ dy)ᵀ x, either added to `acc` or reduced to its signs.
struct SignGradientParams {
  DType dtype;
  Matrix grad_output;       // [M, m]
  Matrix x;                 // [M, n]
  const float* row_weight;  // [M] or null
  float* acc;               // [m, n], or null for signs
  int64_t acc_stride;
  uint32_t* positive;       // [m, ceil(n/32)]
  uint32_t* negative;
};
Launch sign_gradient(const SignGradientParams& params, cudaStream_t stream);

struct PackSignsParams {
  Matrix acc;               // [m, n] fp32
  uint32_t* positive;       // [m, ceil(n/32)]
  uint32_t* negative;
};
Launch pack_signs(const PackSignsParams& params, cudaStream_t stream);

// out = S Z, or Sᵀ Z when `transpose`.
struct SignMatmulParams {
  const uint32_t* positive; // [m, ceil(n/32)]
  const uint32_t* negative;
  int32_t m, n;
  Matrix dense;             // [n, q], or [m, q] when `transpose`; fp32
  bool transpose;
  float* out;               // [m, q], or [n, q]; contiguous
};
Launch sign_matmul(const SignMatmulParams& params, cudaStream_t stream);

}  // namespace lorasb
