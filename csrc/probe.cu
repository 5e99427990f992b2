// Whether the kernels can run: read by `obstacle` in `lorasb_kernels/ops/extension.py`.
#include <cuda_runtime_api.h>

namespace {

// Stands for all kernels, which are compiled for the same architectures.
__global__ void probe_kernel() {}

}  // namespace

// The versions of CUDA that the driver supports (0: there is none) and of the linked runtime, as
// 1000 · major + 10 · minor.
extern "C" __attribute__((visibility("default"))) void lorasb_versions(int* driver, int* runtime) {
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
}

// Why no kernel can run on a device; null if they can.
extern "C" __attribute__((visibility("default"))) const char* lorasb_device_error(int device) {
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaSetDevice(current);
  cudaGetLastError();  // not to be reported by the next launch
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
