// Sums of bf16 numbers: two hold 16 bits of a number, three all 24 of an fp32 one.
#pragma once

#include "elements.cuh"

namespace lorasb {

// The first bf16 of each of two numbers, packed; the numbers keep the remainder.
__device__ inline uint32_t take_bf16(float& low, float& high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  low -= __low2float(pair);
  high -= __high2float(pair);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace lorasb
