// The warpgroup's matrix product (wgmma): 64 rows by N columns, 16 contraction indices at a time,
// both operands in shared memory in the 128-byte swizzle of tensor maps.
//
// Accumulators: warp w of the four holds rows 16w to 16w + 15; in the thread of group g = lane / 4
// and t = lane % 4, for each 8 columns j,
//
//     c[4j],     c[4j + 1]: row g,     columns 8j + 2t, 8j + 2t + 1
//     c[4j + 2], c[4j + 3]: row g + 8, the same columns
#pragma once

#include "../common/elements.cuh"
#include "cluster.cuh"

namespace lorasb::hopper {

// An operand's tile of OUTER indices by K = 64 in shared memory, stored in panels of 128 bytes by
// 8 rows that the swizzle permutes.
//
//     K_CONTIGUOUS    rows are outer indices: one box of OUTER rows of 64 elements
//     otherwise       rows are contraction indices: a box of 64 rows for each 64 outer indices
template <int OUTER_, bool K_CONTIGUOUS_>
struct SwizzledTile {
  static constexpr int OUTER = OUTER_;
  static constexpr bool K_CONTIGUOUS = K_CONTIGUOUS_;
  static constexpr int K = 64;
  static constexpr int BYTES = OUTER * K * 2;
  static constexpr int PANEL_BYTES = 8 * 128;
  static constexpr int BOX_BYTES = K * 128;  // of 64 outer indices, where rows run along K

  // The matrix descriptor (PTX ISA, "Matrix descriptor format"), from the tile's address.
  __device__ static uint64_t descriptor(uint32_t address) {
    constexpr uint64_t SWIZZLE_128_BYTES = 1ull << 62;
    constexpr uint64_t LEADING = K_CONTIGUOUS ? 16 : BOX_BYTES, STRIDE = PANEL_BYTES;
    return SWIZZLE_128_BYTES | (STRIDE >> 4) << 32 | (LEADING >> 4) << 16 | address >> 4;
  }

  // What a descriptor grows by over 16 contraction indices, and over `bytes` of shared memory.
  static constexpr int NEXT_16 = (K_CONTIGUOUS ? 16 * 2 : 16 * 128) >> 4;
  __device__ static uint64_t advanced(uint64_t descriptor, int bytes) {
    return descriptor + (bytes >> 4);
  }
};

// Orders accesses of the accumulators before the products that follow.
__device__ inline void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING committed groups are in flight.
template <int PENDING>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses of the accumulators past this point.
template <int COUNT>
__device__ inline void pin(float (&c)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Stores four 8×8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t row, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]) : "memory");
}

// Operands of the instruction: "%0, %1, ..." and the accumulators.
#define LORASB_TEN(tens)                                                                  \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define LORASB_SIXTY LORASB_TEN() LORASB_TEN(1) LORASB_TEN(2) LORASB_TEN(3) LORASB_TEN(4) LORASB_TEN(5)
#define LORASB_64_NAMES LORASB_SIXTY "%60, %61, %62, %63"
#define LORASB_128_NAMES                                                                \
  LORASB_SIXTY LORASB_TEN(6) LORASB_TEN(7) LORASB_TEN(8) LORASB_TEN(9) LORASB_TEN(10)   \
  LORASB_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define LORASB_8_SUMS(i)                                                                    \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define LORASB_64_SUMS(i)                                                       \
  LORASB_8_SUMS(i), LORASB_8_SUMS(i + 8), LORASB_8_SUMS(i + 16), LORASB_8_SUMS(i + 24), \
      LORASB_8_SUMS(i + 32), LORASB_8_SUMS(i + 40), LORASB_8_SUMS(i + 48), LORASB_8_SUMS(i + 56)

// `OPERANDS` numbers the descriptors, the flag and the two transposes after the accumulators.
#define LORASB_WGMMA(SHAPE, TYPE, NAMES, OPERANDS, FLAG, ...)                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " FLAG ", 0;\n"                              \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES "}, "       \
               OPERANDS ";\n}"                                                                    \
               : __VA_ARGS__                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(!A::K_CONTIGUOUS),               \
                 "n"(!B::K_CONTIGUOUS))

// c (+)= the product of 16 contraction indices of the tiles that the descriptors point into; with
// `add` false c is overwritten.
template <typename T, class A, class B>
__device__ inline void multiply_16(float (&c)[64], uint64_t a, uint64_t b, bool add) {
  static_assert(B::OUTER == 128);
  if constexpr (std::is_same_v<T, bf16>)
    LORASB_WGMMA("m64n128k16", "bf16", LORASB_64_NAMES, "%64, %65, add, 1, 1, %67, %68", "%66",
                 LORASB_64_SUMS(0));
  else
    LORASB_WGMMA("m64n128k16", "f16", LORASB_64_NAMES, "%64, %65, add, 1, 1, %67, %68", "%66",
                 LORASB_64_SUMS(0));
}

template <typename T, class A, class B>
__device__ inline void multiply_16(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  static_assert(B::OUTER == 256);
  if constexpr (std::is_same_v<T, bf16>)
    LORASB_WGMMA("m64n256k16", "bf16", LORASB_128_NAMES, "%128, %129, add, 1, 1, %131, %132",
                 "%130", LORASB_64_SUMS(0), LORASB_64_SUMS(64));
  else
    LORASB_WGMMA("m64n256k16", "f16", LORASB_128_NAMES, "%128, %129, add, 1, 1, %131, %132",
                 "%130", LORASB_64_SUMS(0), LORASB_64_SUMS(64));
}

#undef LORASB_TEN
#undef LORASB_SIXTY
#undef LORASB_64_NAMES
#undef LORASB_128_NAMES
#undef LORASB_8_SUMS
#undef LORASB_64_SUMS
#undef LORASB_WGMMA

}  // namespace lorasb::hopper
