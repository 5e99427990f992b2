// Asynchronous copies from global to shared memory, and the pipeline they feed.
#pragma once

#include "elements.cuh"

namespace lorasb {

// Copies BYTES, of which the first `valid` are read and the rest become zero.
template <int BYTES>
__device__ inline void cp_async(void* shared, const void* global, int valid) {
  const unsigned address = __cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global),
                 "n"(BYTES), "r"(valid) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Runs `load(stage)`, which loads one step after the other, STAGES - 1 steps ahead of
// `compute(step, stage)`.
//
// One barrier per step does two things: it makes the tile that just arrived visible to all warps,
// and it waits until every warp has read the stage that the next load overwrites. On return shared
// memory is free for other use.
template <int STAGES, class Load, class Compute>
__device__ inline void pipeline(int steps, Load load, Compute compute) {
  static_assert(STAGES >= 2);
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(stage == 0 ? STAGES - 1 : stage - 1);
    cp_async_commit();
    compute(step, stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace lorasb
