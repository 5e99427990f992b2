// Stands in for the CUDA runtime, and for the few functions of torch that need a GPU.
//
// Linked with the extension's own object files instead of cudart: the bindings and launchers
// run as they are, on CPU tensors, and each kernel launch is handed to a callback, which
// executes the kernel's PTX. Functions called __wrap_x are reached through the linker's --wrap.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <string>

namespace {

using RecordTensor = void (*)(const void* data, int64_t bytes);
using RunKernel = int (*)(const char* name, const unsigned* grid_and_block, const void* params,
                          size_t shared_bytes);

using EncodeMap = int (*)(void* map, unsigned type, unsigned rank, uint64_t data,
                          const cuuint64_t* sizes, const cuuint64_t* strides,
                          const cuuint32_t* box, const cuuint32_t* steps, unsigned swizzle,
                          unsigned fill);

RecordTensor record_tensor = nullptr;
RunKernel run_kernel = nullptr;
EncodeMap encode_map = nullptr;
int multiprocessors = 2;
int capability[] = {8, 6};
unsigned long long capture = 0;  // of the stream; 0 when it is not captured
int driver_version = CUDART_VERSION;
cudaError_t kernel_error = cudaSuccess;
cudaError_t last_error = cudaSuccess;

struct Kernel {
  std::string name;
  size_t opted_in = 48 * 1024;  // bytes of dynamic shared memory it may have
};

// By host stub. A function, as kernels register themselves before this file's statics exist.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> registered;
  return registered;
}

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} configuration;

void record(AtenTensorHandle tensor, const void* data) {
  int64_t dim, *sizes, *strides, extent = 1;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return;
    extent += (sizes[i] - 1) * strides[i];
  }
  record_tensor(data, extent * aoti_torch_dtype_element_size(dtype));
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const bool refused = interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
                       encode_map(map, type, rank, reinterpret_cast<uint64_t>(data), sizes,
                                  strides, box, steps, swizzle, fill);
  return refused ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void simulator_connect(RecordTensor record, RunKernel run, EncodeMap encode) {
  record_tensor = record;
  run_kernel = run;
  encode_map = encode;
}

EXPORT void simulator_set_device(int count, int major, int minor) {
  multiprocessors = count;
  capability[0] = major;
  capability[1] = minor;
}

EXPORT void simulator_set_capture(unsigned long long id) { capture = id; }

EXPORT void simulator_set_driver(int version, int error_of_kernels) {
  driver_version = version;
  kernel_error = static_cast<cudaError_t>(error_of_kernels);
}

extern "C" {

// torch
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  record(tensor, *data);
  return error;
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  record(tensor, *data);
  return error;
}

AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(const char* ns, const char*, const char* file,
                                                   uint32_t line, TorchLibraryHandle* library) {
  return __real_aoti_torch_library_init_impl(ns, "CPU", file, line, library);
}

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// CUDA runtime
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host].name = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared_bytes, cudaStream_t) {
  const Kernel& known = kernels().at(kernel);
  const bool in_range = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535;
  if (!in_range || shared_bytes > known.opted_in)
    return last_error = cudaErrorInvalidConfiguration;
  const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const int failed = run_kernel(known.name.c_str(), shape, args[0], shared_bytes);
  return last_error = failed ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  kernels().at(kernel).opted_in = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration: return "invalid configuration";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available";
    default: return "launch failure";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = capability[0]; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability[1]; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = !std::strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// As declared, with the options that no caller uses.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = capture;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return kernel_error; }

}  // extern "C"
