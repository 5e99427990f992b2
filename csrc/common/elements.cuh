// Element types and their conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../ops.h"

namespace lorasb {

using fp16 = __half;
using bf16 = __nv_bfloat16;

__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float x) { return x; }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline fp16 from_float<fp16>(float x) { return __float2half_rn(x); }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float from_float<float>(float x) { return x; }

// Two elements in a word, the first in its low half.
__device__ inline float2 unpack(uint32_t pair, bf16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ inline float2 unpack(uint32_t pair, fp16) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
__device__ inline uint32_t pack(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t pack(float low, float high, fp16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls `function(Type<T>{})` with the element type that `dtype` names.
template <class Function>
auto dispatch(DType dtype, Function function) {
  switch (dtype) {
    case DType::fp16: return function(Type<fp16>{});
    case DType::bf16: return function(Type<bf16>{});
    default: return function(Type<float>{});
  }
}

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) { return (a + b - 1) / b; }

}  // namespace lorasb
