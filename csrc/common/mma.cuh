// The warp's matrix product: mma.sync m16n8k16 in 16 bit, FFMA in fp32.
//
// Both keep accumulators as mma.sync does, so a kernel is written once for all element types.
// A 16×8 tile holds, in the thread of group g = lane / 4 and t = lane % 4,
//
//     c[0], c[1]: row g,     columns 2t, 2t + 1
//     c[2], c[3]: row g + 8, columns 2t, 2t + 1
//
// Fp32 stays on FFMA: tensor cores truncate when they accumulate, and over thousands of terms
// three tf32 products add up to an error well above that of fp32.
#pragma once

#include "tile.cuh"

namespace lorasb {

__device__ inline int lane_group() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_pair() { return threadIdx.x % 4 * 2; }

template <bool TRANSPOSE>
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const unsigned address = __cvta_generic_to_shared(row);
  if constexpr (TRANSPOSE)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, fp16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// Adds the product of 16×8 and 8×8 elements in tf32. The contraction takes its indices in the
// order 0, 2, 4, 6, 1, 3, 5, 7: then a thread's elements of A are those it holds of an accumulator,
// a = {c[0], c[2], c[1], c[3]}, and those of B are at neighbouring indices, 2t and 2t + 1.
__device__ inline void mma_m16n8k8(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])),
                 "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                 "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Fragments of one step of K contraction indices: A covers 16 rows, B two tiles of 8 columns.
template <typename T>
struct Fragments {
  static constexpr int K = 16;
  using A = uint32_t[4];
  using B = uint32_t[4];

  template <class Tile>
  __device__ static void load_a(A& a, const T* tile, int m, int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (Tile::K_CONTIGUOUS)
      ldmatrix_x4<false>(a, tile + Tile::at(m + lane % 16, k + lane / 16 * 8));
    else
      ldmatrix_x4<true>(a, tile + Tile::at(m + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
  }

  template <class Tile>
  __device__ static void load_b(B& b, const T* tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (Tile::K_CONTIGUOUS)
      ldmatrix_x4<false>(b, tile + Tile::at(n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
    else
      ldmatrix_x4<true>(b, tile + Tile::at(n + lane / 16 * 8, k + lane / 8 % 2 * 8 + lane % 8));
  }

  // Tile `half` (0 or 1) of the two that B covers.
  __device__ static void multiply(float (&c)[4], const A& a, const B& b, int half) {
    mma_m16n8k16(c, a, b[2 * half], b[2 * half + 1], T{});
  }

  // Zeroes the elements (row, k) of A, counted from the fragment's corner, for which
  // `keep(row, k)` is false.
  template <class Keep>
  __device__ static void mask(A& a, Keep keep) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane_group() + i % 2 * 8, k = lane_pair() + i / 2 * 8;
      a[i] &= (keep(row, k) ? 0x0000FFFFu : 0u) | (keep(row, k + 1) ? 0xFFFF0000u : 0u);
    }
  }
};

template <>
struct Fragments<float> {
  static constexpr int K = 4;
  using A = float[2][4];     // rows g and g + 8, by k
  using B = float[2][2][4];  // by half, columns 2t and 2t + 1, by k

  template <class Tile>
  __device__ static void load(float (&v)[4], const float* tile, int outer, int k) {
    if constexpr (Tile::K_CONTIGUOUS) {
      const float4 quad = *reinterpret_cast<const float4*>(tile + Tile::at(outer, k));
      v[0] = quad.x, v[1] = quad.y, v[2] = quad.z, v[3] = quad.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = tile[Tile::at(outer, k + i)];
    }
  }

  template <class Tile>
  __device__ static void load_a(A& a, const float* tile, int m, int k) {
    load<Tile>(a[0], tile, m + lane_group(), k);
    load<Tile>(a[1], tile, m + lane_group() + 8, k);
  }

  template <class Tile>
  __device__ static void load_b(B& b, const float* tile, int n, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load<Tile>(b[i / 2][i % 2], tile, n + i / 2 * 8 + lane_pair() + i % 2, k);
  }

  __device__ static void multiply(float (&c)[4], const A& a, const B& b, int half) {
    multiply(c, a, b[half]);
  }

  // The four products are summed before they are added to the accumulator, which is then rounded a
  // quarter as often.
  __device__ static void multiply(float (&c)[4], const A& a, const float (&b)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&u)[4] = a[i / 2];
      const float(&v)[4] = b[i % 2];
      c[i] += fmaf(u[3], v[3], fmaf(u[2], v[2], fmaf(u[1], v[1], u[0] * v[0])));
    }
  }

  template <class Keep>
  __device__ static void mask(A& a, Keep keep) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!keep(lane_group() + i / 4 * 8, i % 4)) a[i / 4][i % 4] = 0.f;
  }
};

struct Unchanged {
  template <class A>
  __device__ void operator()(A&, int, int) const {}
};

// Adds the product of rows m… of tile A and columns n… of tile B to the warp's accumulators of
// MI×NI tiles of 16×8. `prepare(a, i, k)` may change the fragment of row tile i at index k.
template <class TileA, class TileB, int MI, int NI, class Prepare = Unchanged>
__device__ inline void warp_multiply(float (&acc)[MI][NI][4], const typename TileA::T* a,
                                     const typename TileB::T* b, int m, int n,
                                     Prepare prepare = {}) {
  using F = Fragments<typename TileA::T>;
  static_assert(NI % 2 == 0 && TileB::K % F::K == 0);
#pragma unroll
  for (int k = 0; k < TileB::K; k += F::K) {
    typename F::A fa[MI];
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      F::template load_a<TileA>(fa[i], a, m + 16 * i, k);
      prepare(fa[i], i, k);
    }
#pragma unroll
    for (int j = 0; j < NI; j += 2) {
      typename F::B fb;
      F::template load_b<TileB>(fb, b, n + 8 * j, k);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < MI; ++i) F::multiply(acc[i][j + half], fa[i], fb, half);
    }
  }
}

}  // namespace lorasb
