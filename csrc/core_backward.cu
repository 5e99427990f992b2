// g = dy B, q = s · g R and dR = s · gᵀ h, reading dy once.
//
// Three launches: g and q by the product onto the rank (rank_product.cuh); then dR = gᵀ h as
// a product over tokens (token_product.cuh), each slice of tokens into its own partial sum;
// then the sum of the partials in the order of the slices, which gives the same bits each run.
// g takes M·r elements of scratch memory, r/m of what is read of dy.
#include "rank_product.cuh"
#include "token_product.cuh"

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

template <typename T>
using Traits = TokenProductTraits<T, false>;

// Slices of tokens for dR: a block a multiprocessor, of 4 steps or more.
template <typename T>
int token_slices(int64_t tokens, int64_t rank) {
  const int64_t tiles = ceil_div<int64_t>(rank, Traits<T>::BLOCK);
  const int64_t wanted = multiprocessors() / (tiles * tiles);
  const int64_t most = tokens / (4 * Traits<T>::BLOCK_K);
  const int64_t slices = wanted < most ? wanted : most;
  return slices < 1 ? 1 : static_cast<int>(slices);
}

struct Workspace {
  size_t g, partials, product, bytes;  // offsets, then the size

  explicit Workspace(const CoreBackwardParams& params) {
    const int64_t tokens = params.dy.rows, rank = params.lora_R.rows;
    const size_t element = params.dtype == DType::fp32 ? 4 : 2;
    const auto aligned = [](size_t size) { return ceil_div<size_t>(size, 256) * 256; };
    const int slices = dispatch(params.dtype, [&](auto type) {
      return token_slices<typename decltype(type)::type>(tokens, rank);
    });
    g = 0;
    partials = aligned(tokens * rank * element);
    product = partials + aligned(slices * rank * rank * sizeof(float));
    bytes = product + rank_product_workspace<true>(params.dtype, rank, tokens, params.dy.columns);
  }
};

}  // namespace

size_t core_backward_workspace(const CoreBackwardParams& params) {
  return Workspace(params).bytes;
}

Launch core_backward(const CoreBackwardParams& params, cudaStream_t stream) {
  const Workspace offsets(params);
  unsigned char* workspace = static_cast<unsigned char*>(params.workspace);
  const int64_t rank = params.lora_R.rows;

  RankProductParams projection{};
  projection.x = params.dy;
  projection.factor = params.lora_B;
  projection.core = params.lora_R;
  projection.rank = static_cast<int>(rank);
  projection.scaling = params.scaling;
  projection.dropout.scale = 1.f;
  projection.first = workspace + offsets.g;
  projection.second = params.q;
  const Launch projected = rank_product<true>(params.dtype, projection,
                                              workspace + offsets.product,
                                              "core_backward (g, q)", stream);
  if (projected.error != cudaSuccess) return projected;

  return dispatch(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    TokenProductParams product{};
    product.a = {workspace + offsets.g, rank, params.dy.rows, static_cast<int>(rank),
                 copy_bytes<T>(rank)};
    product.b = params.h;
    product.output = TokenProductParams::PARTIAL;
    product.out = reinterpret_cast<float*>(workspace + offsets.partials);
    product.out_stride = rank;
    const int slices = token_slices<T>(params.dy.rows, rank);
    const Launch multiplied =
        token_product<Traits<T>>(product, slices, "core_backward (dR)", stream);
    if (multiplied.error != cudaSuccess) return multiplied;

    const SumParams sum{product.out, slices, rank * rank, params.scaling, params.dR};
    return launch(sum_slices_kernel, "core_backward (sum of dR)",
                  dim3(static_cast<unsigned>(ceil_div<int64_t>(rank * rank, SUM_THREADS))),
                  SUM_THREADS, 0, sum, stream);
  });
}

}  // namespace lorasb
