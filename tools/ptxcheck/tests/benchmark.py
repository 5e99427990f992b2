"""Host time of some launches: python -m ptxcheck.tests.benchmark, with `tools` on PYTHONPATH."""

import time
from functools import partial

import numpy as np

import ptxcheck

from . import test_hopper_triton as hopper_kernels
from . import test_triton as triton_kernels
from .sources import CHECKS, HERE
from .triton_compiler import torch

NO_CHECKS = dict.fromkeys(CHECKS, False)


def timed(label, launch, runs=2):
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        stats = launch()
        seconds.append(time.perf_counter() - start)
    print(
        f"{label:58s} first {seconds[0]:6.3f} s, again {min(seconds[1:]):6.3f} s, "
        f"{stats.warp_instructions} warp instructions"
    )


def cuda():
    module = ptxcheck.load(ptxcheck.nvcc_ptx(HERE / "kernels.cu"))
    rng = np.random.default_rng(0)

    def bf16(*shape):
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16)

    for M, N, K in ((128, 128, 256), (512, 512, 512)):
        arguments = [bf16(M, K), bf16(K, N), np.zeros((M, N), np.uint16), M, N, K]
        run = partial(module.launch, "gemm_bf16", (N // 64, M // 64), 128, arguments)
        timed(f"CUDA bf16 GEMM {M}x{N}x{K}, 64x64 tiles, 128 threads", run)
        if M == 128:
            timed("  same, races, uninitialized", partial(run, check_races=True, check_uninit=True))
            timed("  same, stats='full'", partial(run, stats="full"))
            timed("  same, schedule_seed", partial(run, schedule_seed=1))
    n = 1 << 20
    x, y = np.ones(n, np.float32), np.ones(n, np.float32)
    run = partial(module.launch, "saxpy", n // 256, 256, [2.0, x, y, n])
    timed("saxpy, 2^20 elements, 256 threads", run)
    starts = rng.integers(1, 3000, 100_000).astype(np.int32)
    arguments = [starts, np.zeros_like(starts), len(starts)]
    run = partial(module.launch, "collatz", 391, 256, arguments)
    timed("divergent loops (collatz), 100000 threads", run)


def triton():
    for (M, N, K), warps in (
        ((128, 128, 256), 4),
        ((128, 128, 256), 8),
        ((512, 512, 512), 4),
        ((1024, 1024, 1024), 4),
    ):
        R, BM, BN, BK = 32, 128, 128, 32
        kernel = ptxcheck.triton_compile(
            triton_kernels.gemm_ext,
            triton_kernels.SIG,
            dict(R=R, BM=BM, BN=BN, BK=BK, BR=32, GM=8),
            attrs=[*"xwpby", "K", "sx", "sw", "sp", "sb", "sy"],
            num_warps=warps,
        )
        x, w, p, b = (torch.randn(s).bfloat16() for s in ((M, K), (N, K), (M, R), (N, R)))
        y = torch.zeros(M, N, dtype=torch.bfloat16)
        grid = (M // BM) * (N // BN)
        run = partial(kernel, grid, x, w, p, b, y, M, N, K, K, K, R, R, N)
        timed(f"Triton bf16 GEMM {M}x{N}x{K}+{R}, tile {BM}x{BN}x{BK}, {warps} warps", run)


def hopper():
    shape, dtype = (256, 256, 256, 32), torch.bfloat16
    products, gluon = hopper_kernels.descriptor_products, hopper_kernels.gluon_gemm
    for name, run in (
        ("Triton, TMA, 128x128x64, 8 warps", partial(products, dtype, False, *shape)),
        ("Gluon, warp-specialized, 128x128x64", partial(gluon, dtype, False, *shape, grid=4)),
        ("Triton, cp.async, 64x64x64, 4 warps", partial(hopper_kernels.pointers, dtype, False)),
    ):
        for checks, label in (
            (NO_CHECKS, "sm_90a bf16 GEMM, " + name),
            (CHECKS, "  same, checked"),
        ):
            timed(label, lambda run=run, checks=checks: run(**checks)[2], 3)


if __name__ == "__main__":
    if ptxcheck.nvcc.find_nvcc():
        cuda()
    triton()
    hopper()
