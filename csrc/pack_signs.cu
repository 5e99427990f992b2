// The signs of an fp32 matrix as two bit planes. Reads 4·m·n bytes, writes m·n/4.
//
// A warp reads 32 neighbours at a time and takes a ballot: lane i gives bit i. After 32 such words,
// of which each lane keeps one, both planes are written in one coalesced store.
#include "common/launch.cuh"

namespace lorasb {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

__global__ void __launch_bounds__(THREADS)
    pack_signs_kernel(const __grid_constant__ PackSignsParams params) {
  const int lane = threadIdx.x % 32;
  const int words = ceil_div(params.acc.columns, 32);
  const int runs = ceil_div(words, 32);  // of 32 words, a row
  const int64_t run = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int64_t row = run / runs;
  const int first = static_cast<int>(run % runs) * 32;
  if (row >= params.acc.rows) return;

  const float* data = static_cast<const float*>(params.acc.data) + row * params.acc.stride;
  uint32_t positive = 0, negative = 0;
#pragma unroll 8
  for (int word = 0; word < 32; ++word) {
    const int column = (first + word) * 32 + lane;
    const float value = column < params.acc.columns ? data[column] : 0.f;
    const bool bad = !isfinite(value);
    const uint32_t above = __ballot_sync(0xFFFFFFFF, value > 0 || bad);
    const uint32_t below = __ballot_sync(0xFFFFFFFF, value < 0 || bad);
    if (lane == word) positive = above, negative = below;
  }
  if (first + lane < words) {
    params.positive[row * words + first + lane] = positive;
    params.negative[row * words + first + lane] = negative;
  }
}

}  // namespace

Launch pack_signs(const PackSignsParams& params, cudaStream_t stream) {
  const int64_t runs = ceil_div<int64_t>(params.acc.columns, 32 * 32) * params.acc.rows;
  if (runs == 0) return {};
  return launch(pack_signs_kernel, "pack_signs",
                dim3(static_cast<unsigned>(ceil_div<int64_t>(runs, WARPS))), THREADS, 0, params,
                stream);
}

}  // namespace lorasb
