// Copies of boxes of a matrix by the tensor memory accelerator.
//
// A tensor map describes the matrix in global memory. Copies read zeros outside of it and do not
// write there. Coordinates are (column, row).
#pragma once

#include <cuda.h>

#include "mbarrier.cuh"

namespace lorasb::hopper {

// Starts the copy of a box into shared memory; its bytes arrive at `barrier`.
__device__ inline void load_box(uint32_t shared, const CUtensorMap& map, int column, int row,
                                Barrier barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared), "l"(&map), "r"(column), "r"(row),
               "r"(barrier.address) : "memory");
}

// The same into the shared memory of each block that `blocks` has a bit for, at the same address,
// and arriving at the same barrier of that block.
__device__ inline void load_box_into(uint16_t blocks, uint32_t shared, const CUtensorMap& map,
                                     int column, int row, Barrier barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared), "l"(&map),
               "r"(column), "r"(row), "r"(barrier.address), "h"(blocks) : "memory");
}

// Orders this thread's writes to shared memory before bulk copies that follow.
__device__ inline void fence_before_store() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts the copy of a box to global memory, a group of its own.
__device__ inline void store_box(const CUtensorMap& map, int column, int row, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
               "cp.async.bulk.commit_group;" ::"l"(&map), "r"(column), "r"(row), "r"(shared)
               : "memory");
}

// Starts adding a box of fp32 elements to global memory, a group of its own.
__device__ inline void add_box(const CUtensorMap& map, int column, int row, uint32_t shared) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
               "[%0, {%1, %2}], [%3];\n"
               "cp.async.bulk.commit_group;" ::"l"(&map), "r"(column), "r"(row), "r"(shared)
               : "memory");
}

// Waits until at most PENDING of this thread's stores have yet to read their shared memory.
template <int PENDING>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until all of this thread's stores are complete.
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace lorasb::hopper
