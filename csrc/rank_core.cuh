// The core, applied to a block's rows before they are rounded: second = s · first C.
#pragma once

#include "common/mma.cuh"
#include "common/stores.cuh"

namespace lorasb {

// C = Rᵀ, or R in backward, from R [r, r] in global memory: it is small, and read by all blocks.
template <bool BACKWARD>
class CoreReader {
 public:
  __device__ explicit CoreReader(const Matrix& core)
      : data_(static_cast<const float*>(core.data)), stride_(core.stride), rank_(core.rows) {}

  // Elements (k … k + N - 1, n) of C: zero from k = r on, some other column from n = r on.
  template <int N>
  __device__ void load(float (&values)[N], int k, int n) const {
    n = min(n, rank_ - 1);
    if constexpr (BACKWARD) {
      const float* column = data_ + k * stride_ + n;
#pragma unroll
      for (int i = 0; i < N; ++i, column += stride_)
        values[i] = k + i < rank_ ? __ldg(column) : 0.f;
    } else if (k < rank_) {
      // Rows are zero from r on to the next multiple of 16 bytes.
      const float* row = data_ + n * stride_ + k;
      if constexpr (N == 4) {
        const float4 quad = __ldg(reinterpret_cast<const float4*>(row));
        values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
      } else {
        const float2 pair = __ldg(reinterpret_cast<const float2*>(row));
        values[0] = pair.x, values[1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = 0.f;
    }
  }

 private:
  const float* data_;
  int64_t stride_;
  int rank_;
};

// `first` of a block in shared memory, for warps that need ranks that other warps hold.
template <int BLOCK_M, int RANK>
struct SharedFirst {
  static constexpr int PITCH = RANK + 8;  // rows start 8 banks apart
  static constexpr int BYTES = BLOCK_M * PITCH * sizeof(float);

  float* data;

  template <int MI, int NI>
  __device__ void store(const float (&acc)[MI][NI][4], int row0, int rank0) const {
#pragma unroll
    for (int i = 0; i < 2 * MI; ++i)
#pragma unroll
      for (int j = 0; j < NI; ++j)
        *pair(row0 + 8 * i + lane_group(), rank0 + 8 * j + lane_pair()) =
            make_float2(acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
  }

  // Element (row, rank) and the next.
  __device__ float2* pair(int row, int rank) const {
    return reinterpret_cast<float2*>(data + row * PITCH + rank);
  }

  __device__ void load(float (&values)[4], int row, int rank) const {
    const float4 quad = *reinterpret_cast<const float4*>(data + row * PITCH + rank);
    values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
  }
};

// Columns n … n + 7 of first · C for the warp's 16·MI rows from row0 on. In 16 bit in tf32,
// whose products have more bits than the result; `first` is read from the warp's accumulators if
// they hold all ranks.
template <class Traits, int MI, int NI>
__device__ inline void multiply_core(float (&sum)[MI][4], const float (&acc)[MI][NI][4],
                                     const SharedFirst<Traits::BLOCK_M, Traits::RANK>& first,
                                     const CoreReader<Traits::BACKWARD>& core, int row0, int n) {
  if constexpr (std::is_same_v<typename Traits::T, float>) {
#pragma unroll 4
    for (int k = 0; k < Traits::RANK; k += 4) {
      float b[2][4];
      core.load(b[0], k, n + lane_pair());
      core.load(b[1], k, n + lane_pair() + 1);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        float a[2][4];
        first.load(a[0], row0 + 16 * i + lane_group(), k);
        first.load(a[1], row0 + 16 * i + lane_group() + 8, k);
        Fragments<float>::multiply(sum[i], a, b);
      }
    }
  } else {
    constexpr int UNROLL = Traits::CORE_IN_REGISTERS ? Traits::RANK / 8 : 8;
#pragma unroll UNROLL
    for (int k = 0; k < Traits::RANK; k += 8) {
      float b[2];
      core.load(b, k + lane_pair(), n + lane_group());
      b[0] = to_tf32(b[0]), b[1] = to_tf32(b[1]);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        float a[4];
        if constexpr (Traits::CORE_IN_REGISTERS) {
          const float(&c)[4] = acc[i][k / 8];
          a[0] = c[0], a[1] = c[2], a[2] = c[1], a[3] = c[3];
        } else {
          const int row = row0 + 16 * i + lane_group();
          const float2 upper = *first.pair(row, k + lane_pair());
          const float2 lower = *first.pair(row + 8, k + lane_pair());
          a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
        }
        mma_m16n8k8(sum[i], a, b);
      }
    }
  }
}

}  // namespace lorasb
