// The operators `lorasb::*_cuda`, on the LibTorch stable ABI: one build serves any torch from
// 2.10 on and any Python. Schemas are defined in Python; this file only implements them.
//
// Every argument is checked here, before anything is launched.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>

#include "ops.h"

// torch's CPU build lacks this symbol. Weak, it lets the library load there all the same: with
// no CUDA tensors in the process, no operator of ours is ever reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                                                   void**);

// What was built, read by lorasb_kernels/build_info.py.
extern "C" __attribute__((visibility("default"))) const char* lorasb_build_info() {
  return LORASB_BUILD_INFO;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_RANK = 512;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

lorasb::DType element_type(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return lorasb::DType::fp16;
    case ScalarType::BFloat16: return lorasb::DType::bf16;
    case ScalarType::Float: return lorasb::DType::fp32;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", toString(tensor.scalar_type()),
                  "; expected Half, BFloat16 or Float");
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

  void rank(int64_t rank) const {
    STD_TORCH_CHECK(1 <= rank && rank <= MAX_RANK, op_, ": the rank is ", rank,
                    "; expected 1 <= r <= ", MAX_RANK);
  }

  lorasb::Dropout dropout(double p, const std::optional<Tensor>& seed) const {
    STD_TORCH_CHECK(0 <= p && p < 1, op_, ": dropout_p is ", p, "; expected 0 <= dropout_p < 1");
    if (p == 0) return {nullptr, 0, 1.f};
    STD_TORCH_CHECK(seed.has_value(), op_, ": seed is None; expected int64 [1] as dropout_p is ", p);
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

// `tensor` as rows of contiguous elements; the caller has seen to that.
lorasb::Matrix matrix_of(const Tensor& tensor, int rows_dim = 0) {
  lorasb::Matrix matrix{};
  matrix.data = tensor.const_data_ptr();
  matrix.rows = tensor.size(rows_dim);
  matrix.columns = tensor.size(1 - rows_dim);
  matrix.stride = tensor.stride(rows_dim);
  const int64_t element = tensor.element_size();
  const uint64_t alignment = reinterpret_cast<uintptr_t>(matrix.data) |
                             (matrix.rows > 1 ? matrix.stride * element : 0);
  matrix.copy_bytes = alignment % 16 == 0 ? 16 : alignment % 4 == 0 ? 4 : element;
  return matrix;
}

bool contiguous_along(const Tensor& tensor, int dim) {
  return tensor.stride(dim) == 1 || tensor.size(dim) == 1;
}

// The tensor itself, or a copy when its last dimension is not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return contiguous_along(tensor, 1) ? tensor : torch::stable::contiguous(tensor);
}

Tensor workspace_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "lorasb: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const lorasb::Launch& launch, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(launch.error == cudaSuccess, "CUDA kernel ", launch.kernel,
                  " failed to launch: ", cudaGetErrorString(launch.error), " (grid ",
                  launch.grid.x, "×", launch.grid.y, "×", launch.grid.z, ", ",
                  launch.shared_bytes, " bytes of shared memory, operands ", shape_of(a), " and ",
                  shape_of(b), ")");
}

std::tuple<Tensor, Tensor> shrink(const Tensor& x, const Tensor& lora_A, const Tensor& lora_R,
                                  double scaling, double dropout_p,
                                  const std::optional<Tensor>& seed) {
  const Arguments arguments("shrink", x);
  lorasb::ShrinkParams params{};
  params.dtype = element_type("shrink", "x", x);
  STD_TORCH_CHECK(x.dim() == 2, "shrink: x has shape ", shape_of(x), "; expected [M, n]");
  const int64_t r = lora_A.size(0);
  arguments.rank(r);
  arguments.matrix("lora_A", lora_A, x.scalar_type(), r, x.size(1));
  arguments.matrix("lora_R", lora_R, ScalarType::Float, r, r);
  params.dropout = arguments.dropout(dropout_p, seed);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = with_contiguous_rows(x), a_rows = with_contiguous_rows(lora_A),
               core = with_contiguous_rows(lora_R);
  Tensor h = torch::stable::new_empty(x, {x.size(0), r});
  Tensor p = torch::stable::new_empty(x, {x.size(0), r});
  params.x = matrix_of(x_rows);
  params.lora_A = matrix_of(a_rows);
  params.lora_R = matrix_of(core);
  params.scaling = static_cast<float>(scaling);
  params.h = h.mutable_data_ptr();
  params.p = p.mutable_data_ptr();
  const Tensor workspace = workspace_of(x, lorasb::shrink_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(lorasb::shrink(params, current_stream(x)), x, lora_A);
  return {h, p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasb, CUDA, m) {
  m.impl("shrink_cuda", TORCH_BOX(&shrink));
}
