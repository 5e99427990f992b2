// Kernels for clusters of several blocks.  FAULT plants one bug.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef FAULT
#define FAULT 0
#endif
enum { NO_FIRST_SYNC = 1, NO_MIDDLE_SYNC, NO_LAST_SYNC, RELAXED_MIDDLE, WRONG_RANK, CTA_SPACE,
       EARLY_EXIT, ARRIVE_TWICE, WAIT_ONLY, ONE_MISSING, OUT_OF_BOUNDS, UNSYNC_STORE,
       FEW_ARRIVALS, MANY_ARRIVALS, WRONG_TARGET, NO_ARRIVAL_ORDER, REMOTE_WAIT, REMOTE_STATE,
       NO_INIT_FENCE, EXIT_BEFORE_ARRIVALS, NARROW_MASK, WIDE_MASK, NO_WAIT_BEFORE_EXIT, FEW_BYTES,
       SAME_HALF, NO_RELEASE, NO_WAIT, UNINITIALIZED, NO_REDUCE_WAIT, NO_REDUCE_FENCE,
       EARLY_LEAVE };

__device__ __forceinline__ uint32_t smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
#define SYNC_ARRIVE() asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory")
#define SYNC_WAIT() asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")
#define SYNC() do { SYNC_ARRIVE(); SYNC_WAIT(); } while (0)
#define SPECIAL(name) ({ uint32_t v; asm volatile("mov.u32 %0, %%" name ";" : "=r"(v)); v; })
__device__ __forceinline__ uint32_t rank_of() { return SPECIAL("cluster_ctarank"); }
__device__ __forceinline__ uint32_t size_of() { return SPECIAL("cluster_nctarank"); }
__device__ __forceinline__ uint32_t mapa(uint32_t a, uint32_t r) {
    uint32_t v; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(r)); return v;
}
__device__ __forceinline__ void bar_init(uint64_t *b, uint32_t n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(b)), "r"(n) : "memory");
}
__device__ __forceinline__ void bar_expect(uint64_t *b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive_far(uint64_t *b, uint32_t r) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapa(smem(b), r)) : "memory");
}
__device__ __forceinline__ void bar_wait(uint64_t *b, uint32_t parity) {
    asm volatile("{\n.reg .pred P;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], %1;\n"
                 "@P bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(smem(b)), "r"(parity) : "memory");
}

#if FAULT == 0
extern "C" __global__ void ids(uint32_t *y) {
    uint32_t linear = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    uint32_t *o = y + linear * 16;
    if (threadIdx.x) return;
    o[0] = SPECIAL("cluster_ctarank"); o[1] = SPECIAL("cluster_nctarank");
    o[2] = SPECIAL("cluster_ctaid.x"); o[3] = SPECIAL("cluster_ctaid.y"); o[4] = SPECIAL("cluster_ctaid.z");
    o[5] = SPECIAL("cluster_nctaid.x"); o[6] = SPECIAL("cluster_nctaid.y"); o[7] = SPECIAL("cluster_nctaid.z");
    o[8] = SPECIAL("clusterid.x"); o[9] = SPECIAL("clusterid.y"); o[10] = SPECIAL("clusterid.z");
    o[11] = SPECIAL("nclusterid.x"); o[12] = SPECIAL("nclusterid.y"); o[13] = SPECIAL("nclusterid.z");
    uint32_t p;
    asm volatile("{\n.reg .pred P;\nmov.pred P, %%is_explicit_cluster;\nselp.u32 %0, 1, 0, P;\n}" : "=r"(p));
    o[14] = p;
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) fixed(uint32_t *y) {
    y[blockIdx.x] = rank_of();
}
#endif

// every block reads its neighbour's values, adds to rank 0's sum and stores into its neighbour
extern "C" __global__ void exchange(int *y) {
    __shared__ int value[64], box[64], sum;
    int t = threadIdx.x, r = rank_of(), n = size_of(), next = (r + 1) % n;
    value[t] = 1000 * blockIdx.x + t;
    if (t == 0) sum = 0;
    if (FAULT == EARLY_EXIT && r == n - 1) return;
    if (FAULT == NO_FIRST_SYNC) __syncthreads();
    else if (FAULT == RELAXED_MIDDLE) { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); SYNC_WAIT(); }
    else if (FAULT == WAIT_ONLY) SYNC_WAIT();
    else if (FAULT == ARRIVE_TWICE) { SYNC_ARRIVE(); SYNC_ARRIVE(); }
    else if (FAULT == ONE_MISSING) { if (r) SYNC(); else asm volatile("bar.sync 2, 128;" ::: "memory"); }
    else SYNC();
    int got, far;
    uint32_t at = mapa(smem(&value[t]), FAULT == WRONG_RANK ? n : next);
    if (FAULT == OUT_OF_BOUNDS) at += 1 << 20;
    if (FAULT == CTA_SPACE) asm volatile("ld.shared::cta.s32 %0, [%1];" : "=r"(got) : "r"(at));
    else asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(got) : "r"(at) : "memory");
    // the same by a generic address
    uint64_t g;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(g) : "l"((uint64_t)&value[t ^ 1]), "r"(next));
    far = *(volatile int *)g;
    uint32_t rank, in_cluster, in_cta;
    asm volatile("getctarank.u64 %0, %1;" : "=r"(rank) : "l"(g));
    asm volatile("{\n.reg .pred P, Q;\nisspacep.shared::cluster P, %2;\nisspacep.shared::cta Q, %2;\n"
                 "selp.u32 %0, 1, 0, P;\nselp.u32 %1, 1, 0, Q;\n}" : "=r"(in_cluster), "=r"(in_cta) : "l"(g));
    asm volatile("red.shared::cluster.add.s32 [%0], %1;" ::"r"(mapa(smem(&sum), 0)), "r"(t) : "memory");
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(mapa(smem(&box[t]), next)), "r"(7 * t + r) : "memory");
    if (FAULT == UNSYNC_STORE) box[t] = 5;
    if (FAULT == NO_MIDDLE_SYNC) __syncthreads();
    else SYNC();
    int *o = y + (blockIdx.x * 64 + t) * 4;
    o[0] = got; o[1] = far; o[2] = box[t];
    o[3] = (r ? 0 : sum) + 10000 * rank + 100000 * in_cluster + 1000000 * in_cta;
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(got) : "r"(mapa(smem(&value[t]), next)) : "memory");
    if (got != o[0]) o[0] = -1;
    if (FAULT != NO_LAST_SYNC) SYNC();
}

// the blocks hand a value round a ring: each waits for its neighbour's arrival
extern "C" __global__ void ring(int *y, int rounds) {
    __shared__ uint64_t full, empty;
    __shared__ int cell[32];
    int t = threadIdx.x, r = rank_of(), n = size_of(), next = (r + 1) % n, last = (r + n - 1) % n;
    if (t == 0) {
        bar_init(&full, FAULT == FEW_ARRIVALS ? 33 : FAULT == MANY_ARRIVALS ? 16 : 32);
        bar_init(&empty, 32);
        if (FAULT != NO_INIT_FENCE) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    SYNC_WAIT();
    __syncwarp();
    int v = 100 * r + t;
    for (int i = 0; i < rounds; i++) {
        if (i) bar_wait(&empty, i - 1 & 1);          // the next block has read
        asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(mapa(smem(&cell[t]), next)), "r"(v) : "memory");
        if (FAULT == REMOTE_STATE) {
            uint64_t state, g;
            asm volatile("mapa.u64 %0, %1, %2;" : "=l"(g) : "l"((uint64_t)&full), "r"(next));
            asm volatile("mbarrier.arrive.b64 %0, [%1];" : "=l"(state) : "l"(g) : "memory");
        }
        if (FAULT == NO_ARRIVAL_ORDER)
            asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapa(smem(&full), next)) : "memory");
        else bar_arrive_far(&full, FAULT == WRONG_TARGET ? r : next);
        if (FAULT == REMOTE_WAIT) {
            uint64_t g;
            asm volatile("mapa.u64 %0, %1, %2;" : "=l"(g) : "l"((uint64_t)&full), "r"(next));
            asm volatile("{\n.reg .pred P;\nmbarrier.test_wait.parity.b64 P, [%0], 0;\n}" ::"l"(g) : "memory");
        }
        bar_wait(&full, i & 1);
        v = cell[t ^ 1] + 1;
        bar_arrive_far(&empty, last);
    }
    y[blockIdx.x * 32 + t] = v;
    if (FAULT != EXIT_BEFORE_ARRIVALS) SYNC();
}

// every block loads one part of a tile for all; rows of 64 columns; steps steps, one buffer
extern "C" __global__ void spread(const __grid_constant__ CUtensorMap map, const uint8_t *flat, uint8_t *out,
                                  int rows, int steps, int tensor) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full, empty;
    int t = threadIdx.x, r = rank_of(), n = size_of(), part = rows / n * 128;
    if (t == 0) {
        bar_init(&full, 1);
        if (FAULT != UNINITIALIZED || r == 0) bar_init(&empty, 32 * n);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (FAULT == NO_FIRST_SYNC) __syncthreads(); else SYNC();
    if (FAULT == EARLY_LEAVE && r == 1) return;
    for (int i = 0; i < steps; i++) {
        if (t == 0) {
            if (i && FAULT != NO_RELEASE) bar_wait(&empty, i - 1 & 1);
            bar_expect(&full, FAULT == FEW_BYTES ? rows * 128 - part : rows * 128);
            uint16_t mask = (1 << n) - 1;
            if (FAULT == NARROW_MASK) mask = 1 << r;
            if (FAULT == WIDE_MASK) mask = 0x1FF;
            int my = FAULT == SAME_HALF ? 0 : r;
            if (tensor)
                asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                    "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem(memory) + my * part), "l"(&map), "r"(64 * i - 8),
                    "r"((int)blockIdx.x / n * rows + r * rows / n), "r"(smem(&full)), "h"(mask) : "memory");
            else
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                    "[%0], [%1], %2, [%3], %4;" ::"r"(smem(memory) + my * part),
                    "l"(flat + (i * n + r) * part), "r"(part), "r"(smem(&full)), "h"(mask) : "memory");
        }
        __syncwarp();
        if (FAULT == NO_WAIT_BEFORE_EXIT && i == steps - 1 && r == 1) break;
        if (FAULT != NO_WAIT) bar_wait(&full, i & 1);
        for (int j = t; j < rows * 128; j += 32) out[(blockIdx.x * steps + i) * rows * 128 + j] = memory[j];
        for (int k = 0; k < n; k++) bar_arrive_far(&empty, k);
    }
    if (FAULT != NO_LAST_SYNC) SYNC();
}

// blocks add their tiles to the same place
template <typename T, bool TENSOR>
__device__ void add_tiles(const CUtensorMap *map, T *y, int x0, int y0, float scale) {
    extern __shared__ __align__(1024) uint8_t memory[];
    T *tile = (T *)memory;
    int n = 128 / sizeof(T);
    for (int i = threadIdx.x; i < 16 * n; i += blockDim.x) tile[i] = T(float(i % 61) * scale + blockIdx.x);
    if (FAULT != NO_REDUCE_FENCE) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        if (TENSOR)
            asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                         "r"(x0), "r"(y0), "r"(smem(memory)) : "memory");
        else if (sizeof(T) == 4)
            asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(y), "r"(smem(memory)), "r"(2048) : "memory");
        else if (T(1.f) == T(1.f) && __is_same(T, __half))
            asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%0], [%1], %2;" ::"l"(y), "r"(smem(memory)), "r"(2048) : "memory");
        else
            asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(y), "r"(smem(memory)), "r"(2048) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (FAULT != NO_REDUCE_WAIT) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
#define ADD(name, T) \
    extern "C" __global__ void add_##name(const __grid_constant__ CUtensorMap map, T *y, int x0, int y0, float s) { add_tiles<T, true>(&map, y, x0, y0, s); } \
    extern "C" __global__ void add_flat_##name(T *y, float s) { add_tiles<T, false>(0, y, 0, 0, s); }
ADD(f32, float)
ADD(f16, __half)
ADD(bf16, __nv_bfloat16)
