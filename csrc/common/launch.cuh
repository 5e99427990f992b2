// Launching a kernel that takes one params struct.
#pragma once

#include "elements.cuh"

namespace lorasb {

// Dynamic shared memory past this size must be asked for.
constexpr size_t DEFAULT_SHARED_BYTES = 48 * 1024;

template <class Params>
Launch launch(void (*kernel)(Params), const char* name, dim3 grid, int threads,
              size_t shared_bytes, const Params& params, cudaStream_t stream) {
  Launch result{cudaSuccess, name, grid, shared_bytes};
  if (shared_bytes > DEFAULT_SHARED_BYTES) {
    result.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes));
    if (result.error != cudaSuccess) return result;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  result.error = cudaGetLastError();
  return result;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace lorasb
