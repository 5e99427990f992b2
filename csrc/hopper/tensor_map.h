// Tensor maps, made on the host.
#pragma once

#include <cuda.h>

#include "../ops.h"

namespace lorasb::hopper {

// Whether a tensor map can describe the matrix: not empty, its rows less than 2^40 bytes apart and
// not overlapping.
inline bool describable(const Matrix& matrix) {
  const bool rows_apart = matrix.stride >= matrix.columns && matrix.stride < int64_t{1} << 39;
  return matrix.rows > 0 && matrix.columns > 0 && (matrix.rows == 1 || rows_apart);
}

// The map of a `describable` matrix, copied in boxes of box_rows × box_columns.
// Their rows, of 128 or 64 bytes, lie in shared memory in the swizzle of that width.
//
// cuTensorMapEncodeTiled is a function of the driver, which the runtime looks up: the extension
// loads where there is no driver.
inline cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const Matrix& matrix,
                                   int box_rows, int box_columns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorInsufficientDriver;

  constexpr CUtensorMapDataType TYPES[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};  // by DType
  const int bytes = element_size(dtype);
  const int64_t stride = matrix.rows > 1 ? matrix.stride : (matrix.columns + 7) / 8 * 8;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every_element[] = {1, 1};
  const CUresult result = encode(
      map, TYPES[static_cast<int>(dtype)], 2, const_cast<void*>(matrix.data), sizes, strides, box, every_element,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_columns * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace lorasb::hopper
