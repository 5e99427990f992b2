// The operators `lorasb::*_cuda`, on the LibTorch stable ABI: one build serves any torch from
// 2.10 on and any Python. Schemas are defined in Python; this file only implements them.
//
// Every argument is checked here, before anything is launched.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "arrivals.h"

// What was built, read by `build_info` in `lorasb_kernels/ops/extension.py`.
extern "C" __attribute__((visibility("default"))) const char* lorasb_build_info() {
  return LORASB_BUILD_INFO;
}

namespace {

using lorasb::Arguments;
using lorasb::Arrivals;
using lorasb::Rows;
using lorasb::check_launch;
using lorasb::chunked_rows_of;
using lorasb::contiguous_along;
using lorasb::contiguous_rows_of;
using lorasb::current_stream;
using lorasb::shape_of;
using lorasb::workspace_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

// shrink of the layers that read `x`: [layers, M, r], without the first dimension if there is no
// `group`.
std::tuple<Tensor, Tensor> shrink_layers(const Arguments& arguments, const Tensor& x,
                                         const std::vector<Tensor>& lora_As,
                                         const std::vector<Tensor>& lora_Rs, double scaling,
                                         const lorasb::Dropout& dropout, bool group) {
  const lorasb::DType dtype = arguments.matrix_dtype("x", x);
  const int64_t layers = lora_As.size();
  STD_TORCH_CHECK(layers > 0 && lora_Rs.size() == lora_As.size(), "shrink_group: there are ",
                  layers, " lora_As and ", lora_Rs.size(), " lora_Rs; expected one per layer");
  const int64_t M = x.size(0), n = x.size(1), r = arguments.rank("lora_R", lora_Rs[0]);
  for (const Tensor& lora_R : lora_Rs) arguments.matrix("lora_R", lora_R, ScalarType::Float, r, r);
  for (const Tensor& lora_A : lora_As) arguments.matrix("lora_A", lora_A, x.scalar_type(), r, n);

  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const std::vector<int64_t> shape =
      group ? std::vector<int64_t>{layers, M, r} : std::vector<int64_t>{M, r};
  Tensor h = new_empty(x, shape), p = new_empty(x, shape);
  const Rows x_rows = chunked_rows_of(x);
  const Tensor arrivals = Arrivals::of(x, stream);
  // LoRA's backward pass projects on Bᵀ, contiguous in the other dimension.
  const bool transposed =
      !dropout.seed && std::all_of(lora_As.begin(), lora_As.end(), [](const Tensor& lora_A) {
        return !contiguous_along(lora_A, 1) && contiguous_along(lora_A, 0);
      });
  const auto factor_of = [&](const Tensor& tensor) {
    return chunked_rows_of(transposed ? torch::stable::transpose(tensor, 0, 1) : tensor);
  };
  for (int64_t first = 0; first < layers; first += lorasb::MAX_LAYERS) {
    lorasb::ShrinkParams params{};
    params.dtype = dtype;
    params.x = x_rows.matrix;
    params.transposed = transposed;
    params.layers = static_cast<int32_t>(std::min<int64_t>(lorasb::MAX_LAYERS, layers - first));
    std::vector<Rows> factors;
    for (int i = 0; i < params.layers; ++i) {
      factors.push_back(factor_of(lora_As[first + i]));
      params.lora_A[i] = factors.back().matrix;
      factors.push_back(factor_of(lora_Rs[first + i]));
      params.lora_R[i] = factors.back().matrix;
    }
    params.scaling = static_cast<float>(scaling);
    params.dropout = dropout;
    const int64_t offset = first * M * r * x.element_size();
    params.h = static_cast<char*>(h.mutable_data_ptr()) + offset;
    params.p = static_cast<char*>(p.mutable_data_ptr()) + offset;
    params.arrivals = static_cast<unsigned*>(arrivals.mutable_data_ptr());
    const Tensor workspace = workspace_of(x, lorasb::shrink_workspace(params));
    params.workspace = workspace.mutable_data_ptr();
    check_launch(lorasb::shrink(params, stream), x, lora_As[first]);
  }
  return {h, p};
}

std::tuple<Tensor, Tensor> shrink(const Tensor& x, const Tensor& lora_A, const Tensor& lora_R,
                                  double scaling, double dropout,
                                  const std::optional<Tensor>& seed) {
  const Arguments arguments("shrink", x);
  return shrink_layers(arguments, x, {lora_A}, {lora_R}, scaling,
                       arguments.dropout(dropout, seed), false);
}

std::tuple<Tensor, Tensor> shrink_group(const Tensor& x, std::vector<Tensor> lora_As,
                                        std::vector<Tensor> lora_Rs, double scaling) {
  const Arguments arguments("shrink_group", x);
  return shrink_layers(arguments, x, lora_As, lora_Rs, scaling, {nullptr, 0, 1.f}, true);
}

std::tuple<Tensor, Tensor> core_backward(const Tensor& dy, const Tensor& h, const Tensor& lora_B,
                                         const Tensor& lora_R, double scaling) {
  const Arguments arguments("core_backward", dy);
  lorasb::CoreBackwardParams params{};
  params.dtype = arguments.matrix_dtype("dy", dy);
  const int64_t M = dy.size(0), m = dy.size(1), r = arguments.rank("lora_R", lora_R);
  arguments.matrix("h", h, dy.scalar_type(), M, r);
  arguments.matrix("lora_B", lora_B, dy.scalar_type(), m, r);

  const DeviceGuard guard(dy.get_device_index());
  const cudaStream_t stream = current_stream(dy);
  const Rows dy_rows = chunked_rows_of(dy), h_rows = chunked_rows_of(h),
             b_rows = chunked_rows_of(lora_B), core = chunked_rows_of(lora_R);
  Tensor q = new_empty(dy, {M, r}), dR = new_empty(lora_R, {r, r});
  params.dy = dy_rows.matrix;
  params.h = h_rows.matrix;
  params.lora_B = b_rows.matrix;
  params.lora_R = core.matrix;
  params.scaling = static_cast<float>(scaling);
  params.q = q.mutable_data_ptr();
  params.dR = static_cast<float*>(dR.mutable_data_ptr());
  const Tensor workspace = workspace_of(dy, lorasb::core_backward_workspace(params));
  params.workspace = workspace.mutable_data_ptr();
  const Tensor arrivals = Arrivals::of(dy, stream);
  params.arrivals = static_cast<unsigned*>(arrivals.mutable_data_ptr());
  check_launch(lorasb::core_backward(params, stream), dy, lora_B);
  return {q, dR};
}

Tensor expand(const Tensor& x, const Tensor& weight, const Tensor& p, const Tensor& factor,
              const std::optional<Tensor>& bias, double dropout,
              const std::optional<Tensor>& seed) {
  const Arguments arguments("expand", x);
  lorasb::ExpandParams params{};
  params.dtype = arguments.matrix_dtype("x", x);
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
  const auto operand_of = [&](const Tensor& tensor) {
    return chunked_rows_of(transposed ? torch::stable::transpose(tensor, 0, 1) : tensor);
  };
  const Rows x_rows = chunked_rows_of(x), p_rows = chunked_rows_of(p),
             weight_rows = operand_of(weight), factor_rows = operand_of(factor);
  Tensor y = new_empty(x, {M, N});
  params.x = x_rows.matrix;
  params.weight = {weight_rows.matrix, transposed};
  params.p = p_rows.matrix;
  params.factor = {factor_rows.matrix, transposed};
  params.bias = bias ? bias->const_data_ptr() : nullptr;
  params.dropout = arguments.dropout(dropout, seed);
  params.y = y.mutable_data_ptr();
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
  const Rows dy_rows = chunked_rows_of(grad_output), x_rows = chunked_rows_of(x);
  params.grad_output = dy_rows.matrix;
  params.x = x_rows.matrix;
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
  const Rows rows = contiguous_rows_of(acc);
  const auto planes = new_planes(acc, acc.size(0), acc.size(1));
  lorasb::PackSignsParams params{};
  params.acc = rows.matrix;
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
               below = torch::stable::contiguous(negative);
  const Rows rows = chunked_rows_of(dense);
  Tensor out = new_empty(dense, {transpose ? n : m, q});
  lorasb::SignMatmulParams params{};
  params.positive = static_cast<const uint32_t*>(above.const_data_ptr());
  params.negative = static_cast<const uint32_t*>(below.const_data_ptr());
  params.dense = rows.matrix;
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
  m.impl("shrink_group_cuda", TORCH_BOX(&shrink_group));
  m.impl("core_backward_cuda", TORCH_BOX(&core_backward));
  m.impl("expand_cuda", TORCH_BOX(&expand));
  m.impl("sign_accumulate_cuda", TORCH_BOX(&sign_accumulate));
  m.impl("sign_gradient_cuda", TORCH_BOX(&sign_gradient));
  m.impl("pack_signs_cuda", TORCH_BOX(&pack_signs));
  m.impl("sign_matmul_cuda", TORCH_BOX(&sign_matmul));
}
