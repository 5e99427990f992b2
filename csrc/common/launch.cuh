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

// An attribute of the current device; `otherwise` if it is not known.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  cudaGetDevice(&device);
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : otherwise;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }

// Compute capability 9.0: kernels compiled for sm_90a run there and nowhere else.
inline bool is_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, 0) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor, 0) == 0;
}

}  // namespace lorasb
