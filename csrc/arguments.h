// From torch's tensors to the structs of ops.h: checks of arguments, rows of matrices, scratch
// memory. On the LibTorch stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "ops.h"

// torch's CPU build lacks this symbol. Declared weak, it does not stop the library from loading
// there: without CUDA tensors in the process, these operators are never reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                                                   void**);

namespace lorasb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_RANK = 512;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

// Checks of one operation's arguments; the messages name the operation and the argument.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first) : op_(op), first_(first) {}

  void matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
              int64_t columns) const {
    check(name, tensor, dtype);
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                    op_, ": ", name, " has shape ", shape_of(tensor), "; expected [", rows, ", ",
                    columns, "]");
  }

  void vector(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) const {
    check(name, tensor, dtype);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op_, ": ", name, " has shape ",
                    shape_of(tensor), "; expected [", size, "]");
    STD_TORCH_CHECK(size < 2 || tensor.stride(0) == 1, op_, ": ", name, " has stride ",
                    tensor.stride(0), "; expected it contiguous");
  }

  // The element type of the matrix whose type all others must have.
  DType matrix_dtype(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 2, op_, ": ", name, " has shape ", shape_of(tensor),
                    "; expected two dimensions");
    switch (tensor.scalar_type()) {
      case ScalarType::Half: return DType::fp16;
      case ScalarType::BFloat16: return DType::bf16;
      case ScalarType::Float: return DType::fp32;
      default: break;
    }
    STD_TORCH_CHECK(false, op_, ": ", name, " has dtype ", toString(tensor.scalar_type()),
                    "; expected Half, BFloat16 or Float");
  }

  // The rank, taken from the fp32 core [r, r].
  int64_t rank(const char* name, const Tensor& core) const {
    STD_TORCH_CHECK(core.dim() == 2 && 1 <= core.size(0) && core.size(0) <= MAX_RANK, op_, ": ",
                    name, " has shape ", shape_of(core), "; expected [r, r] with 1 <= r <= ",
                    MAX_RANK);
    matrix(name, core, ScalarType::Float, core.size(0), core.size(0));
    return core.size(0);
  }

  Dropout dropout(double p, const std::optional<Tensor>& seed) const {
    STD_TORCH_CHECK(0 <= p && p < 1, op_, ": dropout is ", p, "; expected 0 <= dropout < 1");
    if (p == 0) return {nullptr, 0, 1.f};
    STD_TORCH_CHECK(seed.has_value(), op_, ": seed is None; expected int64 [1] as dropout is ",
                    p);
    vector("seed", *seed, ScalarType::Long, 1);
    const double threshold = std::fmin(std::nearbyint(p * 4294967296.0), 4294967295.0);
    return {static_cast<const int64_t*>(seed->const_data_ptr()),
            static_cast<uint32_t>(threshold), static_cast<float>(1 / (1 - p))};
  }

 private:
  void check(const char* name, const Tensor& tensor, ScalarType dtype) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first_.get_device_index(),
                    op_, ": ", name, " is not on the CUDA device of the first argument");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op_, ": ", name, " has dtype ",
                    toString(tensor.scalar_type()), "; expected ", toString(dtype));
  }

  const char* op_;
  const Tensor& first_;
};

inline bool contiguous_along(const Tensor& tensor, int dim) {
  return tensor.stride(dim) == 1 || tensor.size(dim) == 1;
}

// A matrix of a kernel, and the tensor that owns its memory.
struct Rows {
  Tensor owner;
  Matrix matrix;
};

// A matrix with contiguous rows, copied only if it has others.
inline Rows contiguous_rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(0) < INT32_MAX && tensor.size(1) < INT32_MAX,
                  "lorasb: a tensor has shape ", shape_of(tensor),
                  "; expected each dimension below 2^31");
  const Tensor rows = contiguous_along(tensor, 1) ? tensor : torch::stable::contiguous(tensor);
  return {rows, {rows.const_data_ptr(), rows.stride(0), static_cast<int32_t>(rows.size(0)),
                 static_cast<int32_t>(rows.size(1))}};
}

// A matrix by rows of whole 16-byte chunks, as asynchronous copies need them. One with other rows,
// which is rare, is copied into rows padded with zeros: a kernel for elements would read it slower.
inline Rows chunked_rows_of(const Tensor& tensor) {
  const int64_t bytes = tensor.element_size();
  const auto whole = [&](uint64_t offset) { return offset % 16 == 0; };
  const bool chunked = contiguous_along(tensor, 1) && whole(tensor.size(1) * bytes) &&
                       (tensor.size(0) < 2 || whole(tensor.stride(0) * bytes)) &&
                       whole(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
  if (chunked) return contiguous_rows_of(tensor);
  const int64_t chunk = 16 / bytes, padding = chunk - tensor.size(1) % chunk;
  Rows padded = contiguous_rows_of(torch::stable::pad(tensor, {0, padding}));
  padded.matrix.columns = static_cast<int32_t>(tensor.size(1));
  return padded;
}

inline Tensor workspace_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "lorasb: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const Launch& launch, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(launch.error == cudaSuccess, "CUDA kernel ", launch.kernel,
                  " failed to launch: ", cudaGetErrorString(launch.error), " (grid ",
                  launch.grid.x, "×", launch.grid.y, "×", launch.grid.z, ", ",
                  launch.shared_bytes, " bytes of shared memory, operands ", shape_of(a), " and ",
                  shape_of(b), ")");
}

}  // namespace lorasb
