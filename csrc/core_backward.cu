// g = dy B, q = s · g R and dR = s · gᵀ h, reading dy once.
//
// Three launches: g and q by the product onto the rank (rank_product.h); then dR = gᵀ h as
// a product over tokens (token_product.cu), each slice of tokens into its own partial sum;
// then the sum of the partials in the order of the slices, which gives the same bits each run.
// g takes M·r elements of scratch memory, a share of r/m of the size of dy.
#include "common/launch.cuh"
#include "rank_product.h"
#include "token_product.h"

namespace lorasb {
namespace {

struct SumParams {
  const float* partials;  // [slices, count]
  int slices;
  int64_t count;
  float scaling;
  float* out;             // [count]
};

constexpr int SUM_THREADS = 128;

__global__ void __launch_bounds__(SUM_THREADS)
    sum_slices_kernel(const __grid_constant__ SumParams params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * SUM_THREADS + threadIdx.x;
  if (i >= params.count) return;
  float sum = 0.f;
#pragma unroll 8
  for (int slice = 0; slice < params.slices; ++slice)
    sum += params.partials[slice * params.count + i];
  params.out[i] = params.scaling * sum;
}

struct Workspace {
  int g_stride;                        // elements; rows of g take whole 16-byte chunks
  size_t g, partials, product, bytes;  // offsets, then the size

  explicit Workspace(const CoreBackwardParams& params) {
    const int64_t tokens = params.dy.rows;
    const int rank = params.lora_R.rows, chunk = 16 / element_size(params.dtype);
    const auto aligned = [](size_t size) { return ceil_div<size_t>(size, 256) * 256; };
    const int slices = token_slices(params.dtype, tokens, rank, rank);
    g_stride = ceil_div(rank, chunk) * chunk;
    g = 0;
    partials = aligned(tokens * g_stride * element_size(params.dtype));
    product = partials + aligned(static_cast<size_t>(slices) * rank * rank * sizeof(float));
    bytes = product + rank_product_workspace<RankMode::BACKWARD>(params.dtype, rank, tokens,
                                                                 params.dy.columns, 1);
  }
};

}  // namespace

size_t core_backward_workspace(const CoreBackwardParams& params) {
  return Workspace(params).bytes;
}

Launch core_backward(const CoreBackwardParams& params, cudaStream_t stream) {
  const Workspace offsets(params);
  unsigned char* workspace = static_cast<unsigned char*>(params.workspace);
  const int rank = params.lora_R.rows;

  RankProductParams projection{};
  projection.x = params.dy;
  projection.layers = 1;
  projection.factor[0] = params.lora_B;
  projection.core[0] = params.lora_R;
  projection.scaling = params.scaling;
  projection.dropout.scale = 1.f;
  projection.first = workspace + offsets.g;
  projection.first_stride = offsets.g_stride;
  projection.second = params.q;
  projection.arrivals = params.arrivals;
  const Launch projected = rank_product<RankMode::BACKWARD>(
      params.dtype, projection, workspace + offsets.product, "core_backward (g, q)", stream);
  if (projected.error != cudaSuccess) return projected;

  TokenProductParams product{};
  product.a = {workspace + offsets.g, offsets.g_stride, params.dy.rows, rank};
  product.b = params.h;
  product.output = TokenProductParams::PARTIAL;
  product.out = reinterpret_cast<float*>(workspace + offsets.partials);
  product.out_stride = rank;
  const int slices = token_slices(params.dtype, params.dy.rows, rank, rank);
  const Launch multiplied =
      token_product(params.dtype, product, slices, "core_backward (dR)", stream);
  if (multiplied.error != cudaSuccess) return multiplied;

  const SumParams sum{product.out, slices, int64_t{rank} * rank, params.scaling, params.dR};
  return launch(sum_slices_kernel, "core_backward (sum of dR)",
                dim3(static_cast<unsigned>(ceil_div<int64_t>(sum.count, SUM_THREADS))),
                SUM_THREADS, 0, sum, stream);
}

}  // namespace lorasb
