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

// torch's CPU build lacks this symbol. Declared weak, it does not stop the library from loading
// there: without CUDA tensors in the process, these operators are never reached.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                                                   void**);

// What was built, read by `build_info` in `lorasb_kernels/ops/extension.py`.
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
  lorasb::DType matrix_dtype(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 2, op_, ": ", name, " has shape ", shape_of(tensor),
                    "; expected two dimensions");
    switch (tensor.scalar_type()) {
      case ScalarType::Half: return lorasb::DType::fp16;
      case ScalarType::BFloat16: return lorasb::DType::bf16;
      case ScalarType::Float: return lorasb::DType::fp32;
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

  lorasb::Dropout dropout(double p, const std::optional<Tensor>& seed) const {
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

// `tensor`, or its transpose, as rows of contiguous elements; the caller has checked that.
lorasb::Matrix matrix_of(const Tensor& tensor, bool transposed = false) {
  const int row = transposed ? 1 : 0, column = 1 - row;
  STD_TORCH_CHECK(tensor.size(0) < INT32_MAX && tensor.size(1) < INT32_MAX,
                  "lorasb: a tensor has shape ", shape_of(tensor),
                  "; expected each dimension below 2^31");
  lorasb::Matrix matrix{};
  matrix.data = tensor.const_data_ptr();
  matrix.rows = static_cast<int32_t>(tensor.size(row));
  matrix.columns = static_cast<int32_t>(tensor.size(column));
  matrix.stride = tensor.stride(row);
  const uint64_t pitch = matrix.rows > 1 ? matrix.stride * tensor.element_size() : 0;
  matrix.copy_bytes = lorasb::copy_bytes(reinterpret_cast<uintptr_t>(matrix.data) | pitch);
  return matrix;
}

bool contiguous_along(const Tensor& tensor, int dim) {
  return tensor.stride(dim) == 1 || tensor.size(dim) == 1;
}

// The tensor itself, or a copy when its last dimension is not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return contiguous_along(tensor, 1) ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself, or a copy when its first dimension is not contiguous.
Tensor with_contiguous_columns(const Tensor& tensor) {
  using torch::stable::transpose;
  if (contiguous_along(tensor, 0)) return tensor;
  return transpose(torch::stable::contiguous(transpose(tensor, 0, 1)), 0, 1);
}

// A copy with rows at multiples of 16 bytes.
Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t unit = 16 / tensor.element_size(), columns = tensor.size(1);
  const int64_t padding[] = {0, (unit - columns % unit) % unit};
  Tensor padded = torch::stable::pad(tensor, padding);
  return torch::stable::narrow(padded, 1, 0, columns);
}

Tensor workspace_of(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "lorasb: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const lorasb::Launch& launch, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(launch.error == cudaSuccess, "CUDA kernel ", launch.kernel,
                  " failed to launch: ", cudaGetErrorString(launch.error), " (grid ",
                  launch.grid.x, "×", launch.grid.y, "×", launch.grid.z, ", ",
                  launch.shared_bytes, " bytes of shared memory, operands ", shape_of(a), " and ",
                  shape_of(b), ")");
}

using torch::stable::new_empty;
using torch::stable::transpose;
using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> shrink(const Tensor& x, const Tensor& lora_A, const Tensor& lora_R,
                                  double scaling, double dropout,
                                  const std::optional<Tensor>& seed) {
  const Arguments arguments("shrink", x);
  const lorasb::DType dtype = arguments.matrix_dtype("x", x);
  const int64_t M = x.size(0), n = x.size(1), r = arguments.rank("lora_R", lora_R);
  arguments.matrix("lora_A", lora_A, x.scalar_type(), r, n);

  const DeviceGuard guard(x.get_device_index());
  const Tensor x_rows = with_contiguous_rows(x), a_rows = with_contiguous_rows(lora_A),
               core = with_contiguous_rows(lora_R);
  Tensor h = new_empty(x, {M, r}), p = new_empty(x, {M, r});
  lorasb::ShrinkParams params{};
  params.dtype = dtype;
  params.x = matrix_of(x_rows);
  params.lora_A = matrix_of(a_rows);
  params.lora_R = matrix_of(core);
  params.scaling = static_cast<float>(scaling);
  params.dropout = arguments.dropout(dropout, seed);
  params.h = h.mutable_data_ptr();
  params.p = p.mutable_data_ptr();
  const Tensor workspace = workspace_of(x, lorasb::shrink_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(lorasb::shrink(params, current_stream(x)), x, lora_A);
  return {h, p};
}

std::tuple<Tensor, Tensor> core_backward(const Tensor& dy, const Tensor& h, const Tensor& lora_B,
                                         const Tensor& lora_R, double scaling) {
  const Arguments arguments("core_backward", dy);
  const lorasb::DType dtype = arguments.matrix_dtype("dy", dy);
  const int64_t M = dy.size(0), m = dy.size(1), r = arguments.rank("lora_R", lora_R);
  arguments.matrix("h", h, dy.scalar_type(), M, r);
  arguments.matrix("lora_B", lora_B, dy.scalar_type(), m, r);

  const DeviceGuard guard(dy.get_device_index());
  const Tensor dy_rows = with_contiguous_rows(dy), h_rows = with_contiguous_rows(h),
               b_rows = with_contiguous_rows(lora_B), core = with_contiguous_rows(lora_R);
  Tensor q = new_empty(dy, {M, r}), dR = new_empty(lora_R, {r, r});
  lorasb::CoreBackwardParams params{};
  params.dtype = dtype;
  params.dy = matrix_of(dy_rows);
  params.h = matrix_of(h_rows);
  params.lora_B = matrix_of(b_rows);
  params.lora_R = matrix_of(core);
  params.scaling = static_cast<float>(scaling);
  params.q = q.mutable_data_ptr();
  params.dR = static_cast<float*>(dR.mutable_data_ptr());
  const Tensor workspace = workspace_of(dy, lorasb::core_backward_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(lorasb::core_backward(params, current_stream(dy)), dy, lora_B);
  return {q, dR};
}

Tensor expand(const Tensor& x, const Tensor& weight, const Tensor& p, const Tensor& factor,
              const std::optional<Tensor>& bias, double dropout,
              const std::optional<Tensor>& seed) {
  const Arguments arguments("expand", x);
  const lorasb::DType dtype = arguments.matrix_dtype("x", x);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(weight.dim() == 2 && p.dim() == 2, "expand: weight has shape ",
                  shape_of(weight), " and p has shape ", shape_of(p),
                  "; expected [N, K] and [M, r]");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = p.size(1);
  arguments.matrix("weight", weight, type, N, K);
  arguments.matrix("p", p, type, M, r);
  arguments.matrix("factor", factor, type, N, r);
  if (bias) arguments.vector("bias", *bias, type, N);

  const DeviceGuard guard(x.get_device_index());
  // The kernel needs weight and factor contiguous in the same dimension. The weight decides which;
  // the factor, which is small, is copied if it differs.
  const bool transposed = !contiguous_along(weight, 1) && contiguous_along(weight, 0);
  const Tensor x_rows = with_contiguous_rows(x);
  const Tensor w = transposed ? weight : with_contiguous_rows(weight);
  Tensor p_rows = with_contiguous_rows(p);
  Tensor f = transposed ? with_contiguous_columns(factor) : with_contiguous_rows(factor);
  Tensor y = new_empty(x, {M, N});
  lorasb::ExpandParams params{};
  params.dtype = dtype;
  params.x = matrix_of(x_rows);
  params.weight = {matrix_of(w, transposed), transposed};
  params.p = matrix_of(p_rows);
  params.factor = {matrix_of(f, transposed), transposed};
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.dropout = arguments.dropout(dropout, seed);
  params.y = y.mutable_data_ptr();
  if (lorasb::expand_wants_aligned_rank(params)) {
    p_rows = with_aligned_rows(p_rows);
    f = transposed ? transpose(with_aligned_rows(transpose(f, 0, 1)), 0, 1) : with_aligned_rows(f);
    params.p = matrix_of(p_rows);
    params.factor = {matrix_of(f, transposed), transposed};
  }
  check_launch(lorasb::expand(params, current_stream(x)), x, weight);
  return y;
}

// The part that the two forms of the weight gradient share; `output` says where the result goes.
template <class Output>
void weight_gradient(const char* op, const Tensor& grad_output, const Tensor& x,
                     const std::optional<Tensor>& row_weight, Output output) {
  const Arguments arguments(op, x);
  lorasb::SignGradientParams params{};
  params.dtype = arguments.matrix_dtype("x", x);
  STD_TORCH_CHECK(grad_output.dim() == 2, op, ": grad_output has shape ", shape_of(grad_output),
                  "; expected [M, m]");
  arguments.matrix("grad_output", grad_output, x.scalar_type(), x.size(0), grad_output.size(1));
  if (row_weight) arguments.vector("row_weight", *row_weight, ScalarType::Float, x.size(0));

  const DeviceGuard guard(x.get_device_index());
  const Tensor dy_rows = with_contiguous_rows(grad_output), x_rows = with_contiguous_rows(x);
  params.grad_output = matrix_of(dy_rows);
  params.x = matrix_of(x_rows);
  if (row_weight) params.row_weight = static_cast<const float*>(row_weight->const_data_ptr());
  output(arguments, params);
  check_launch(lorasb::sign_gradient(params, current_stream(x)), grad_output, x);
}

void sign_accumulate(Tensor acc, const Tensor& grad_output, const Tensor& x,
                     const std::optional<Tensor>& row_weight) {
  weight_gradient("sign_accumulate", grad_output, x, row_weight,
                  [&](const Arguments& arguments, lorasb::SignGradientParams& params) {
                    arguments.matrix("acc", acc, ScalarType::Float, grad_output.size(1), x.size(1));
                    STD_TORCH_CHECK(contiguous_along(acc, 1), "sign_accumulate: acc has stride ",
                                    acc.stride(1), "; expected a contiguous last dimension");
                    params.acc = static_cast<float*>(acc.mutable_data_ptr());
                    params.acc_stride = acc.stride(0);
                  });
}

int64_t words_of(int64_t columns) { return (columns + 31) / 32; }

std::tuple<Tensor, Tensor> new_planes(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t words = words_of(columns);
  return {new_empty(like, {rows, words}, ScalarType::Int),
          new_empty(like, {rows, words}, ScalarType::Int)};
}

uint32_t* words_in(const Tensor& plane) { return static_cast<uint32_t*>(plane.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> sign_gradient(const Tensor& grad_output, const Tensor& x,
                                         const std::optional<Tensor>& row_weight) {
  std::tuple<Tensor, Tensor> planes;
  weight_gradient("sign_gradient", grad_output, x, row_weight,
                  [&](const Arguments&, lorasb::SignGradientParams& params) {
                    planes = new_planes(x, grad_output.size(1), x.size(1));
                    params.positive = words_in(std::get<0>(planes));
                    params.negative = words_in(std::get<1>(planes));
                  });
  return planes;
}

std::tuple<Tensor, Tensor> pack_signs(const Tensor& acc) {
  const Arguments arguments("pack_signs", acc);
  STD_TORCH_CHECK(acc.dim() == 2, "pack_signs: acc has shape ", shape_of(acc),
                  "; expected [m, n]");
  arguments.matrix("acc", acc, ScalarType::Float, acc.size(0), acc.size(1));
  const DeviceGuard guard(acc.get_device_index());
  const Tensor rows = with_contiguous_rows(acc);
  const auto planes = new_planes(acc, acc.size(0), acc.size(1));
  lorasb::PackSignsParams params{};
  params.acc = matrix_of(rows);
  params.positive = words_in(std::get<0>(planes));
  params.negative = words_in(std::get<1>(planes));
  check_launch(lorasb::pack_signs(params, current_stream(acc)), acc, std::get<0>(planes));
  return planes;
}

Tensor sign_matmul(const Tensor& positive, const Tensor& negative, const Tensor& dense,
                   int64_t columns, bool transpose) {
  const Arguments arguments("sign_matmul", dense);
  STD_TORCH_CHECK(positive.dim() == 2 && dense.dim() == 2, "sign_matmul: positive has shape ",
                  shape_of(positive), " and dense has shape ", shape_of(dense),
                  "; expected two dimensions");
  const int64_t m = positive.size(0), n = columns, q = dense.size(1);
  arguments.matrix("positive", positive, ScalarType::Int, m, words_of(n));
  arguments.matrix("negative", negative, ScalarType::Int, m, words_of(n));
  arguments.matrix("dense", dense, ScalarType::Float, transpose ? m : n, q);

  const DeviceGuard guard(dense.get_device_index());
  const Tensor above = torch::stable::contiguous(positive),
               below = torch::stable::contiguous(negative), rows = with_contiguous_rows(dense);
  Tensor out = new_empty(dense, {transpose ? n : m, q});
  lorasb::SignMatmulParams params{};
  params.positive = static_cast<const uint32_t*>(above.const_data_ptr());
  params.negative = static_cast<const uint32_t*>(below.const_data_ptr());
  params.dense = matrix_of(rows);
  params.m = static_cast<int32_t>(m);
  params.n = static_cast<int32_t>(n);
  params.transpose = transpose;
  params.out = static_cast<float*>(out.mutable_data_ptr());
  check_launch(lorasb::sign_matmul(params, current_stream(dense)), positive, dense);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasb, CUDA, m) {
  m.impl("shrink_cuda", TORCH_BOX(&shrink));
  m.impl("core_backward_cuda", TORCH_BOX(&core_backward));
  m.impl("expand_cuda", TORCH_BOX(&expand));
  m.impl("sign_accumulate_cuda", TORCH_BOX(&sign_accumulate));
  m.impl("sign_gradient_cuda", TORCH_BOX(&sign_gradient));
  m.impl("pack_signs_cuda", TORCH_BOX(&pack_signs));
  m.impl("sign_matmul_cuda", TORCH_BOX(&sign_matmul));
}
