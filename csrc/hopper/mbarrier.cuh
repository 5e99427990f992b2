// Barriers in shared memory that count arrivals and the bytes of bulk copies (mbarrier).
//
// A barrier completes one phase after the other, and a wait names its phase by its parity: 0, 1, 0,
// ... The phase before the first, of parity 1, counts as complete.
#pragma once

#include "cluster.cuh"

namespace lorasb::hopper {

struct Barrier {
  static constexpr int BYTES = 8;
  uint32_t address;  // in shared memory

  __device__ void initialize(int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals)
                 : "memory");
  }

  __device__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }

  // Arrives at the same barrier of another block of the cluster, or of this one.
  //
  // The scope is the default: `.release.cluster` would put a MEMBAR.GPU into the loop, and neither
  // the order of reads before a release nor that of a bulk copy after it needs one.
  __device__ void arrive_in(uint32_t block) const {
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address), "r"(block)
                 : "memory");
  }

  // Arrives, and adds to the bytes that must arrive before the phase completes.
  __device__ void arrive_and_expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address),
                 "r"(bytes) : "memory");
  }

  __device__ void wait(uint32_t parity) const {
    asm volatile("{\n.reg .pred complete;\n"
                 "AGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
                 "@complete bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE:\n}" ::"r"(address), "r"(parity) : "memory");
  }
};

// Makes initialized barriers visible to the cluster and to bulk copies; a cluster barrier follows.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A place in a ring of buffers that are filled and emptied in turn.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;  // of the phase in which this round fills the stage

  __device__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

}  // namespace lorasb::hopper
