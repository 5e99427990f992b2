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

// A row-major matrix. A kernel that copies it asynchronously needs rows of whole 16-byte chunks:
// their addresses, and the number of columns up to the padding, are multiples of 16 bytes.
struct Matrix {
  const void* data;
  int64_t stride;      // elements from one row to the next
  int32_t rows, columns;
};

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

constexpr int MAX_LAYERS = 3;  // of one launch; the largest sets of siblings are q, k and v
constexpr int MAX_ARRIVALS = 1024;  // row tiles whose contraction is split, of all layers

// h = drop(x) Aᵀ, p = s · h Rᵀ, for one layer or several that read the same x (without dropout).
struct ShrinkParams {
  DType dtype;
  Matrix x;                   // [M, n]
  int32_t layers;
  bool transposed;            // of lora_A and lora_R: [n, r], and R transposed; without dropout
  Matrix lora_A[MAX_LAYERS];  // [r, n]
  Matrix lora_R[MAX_LAYERS];  // [r, r] fp32
  float scaling;
  Dropout dropout;
  void* h;                    // [layers, M, r] contiguous
  void* p;                    // [layers, M, r] contiguous
  void* workspace;
  unsigned* arrivals;         // [MAX_ARRIVALS], zero before and after; of this stream alone
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
  unsigned* arrivals;  // as of ShrinkParams
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
