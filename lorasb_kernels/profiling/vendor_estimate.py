"""NVIDIA's own estimate of a GEMM, where the package `nvidia-matmul-heuristics` is installed.

`pip install lorasb_kernels[heuristics]`. It needs no GPU. Shown beside the model, never used by it.
"""

import functools
import importlib.util

from lorasb_kernels.hardware.gpus import Gpu

_NAMES = {
    "a6000": "RTX_A6000",
    "a100": "A100_SXM_80GB",
    "l40s": "L40S",
    "rtx4090": "RTX_4090",
    "rtx5090": "RTX_5090",
    "h100": "H100_SXM",
    "h200": "H200_SXM",
}
_CANDIDATES = 8


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("nvMatmulHeuristics") is not None


@functools.lru_cache(maxsize=1024)
def vendor_estimate(gpu: Gpu, M: int, N: int, K: int) -> float:
    """Seconds of x [M, K] · Wᵀ [K, N] in 16 bits: the best of NVIDIA's candidates.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    import nvMatmulHeuristics as heuristics

    interface = heuristics.NvMatmulHeuristicsInterfaceEx(
        backend=heuristics.NvMatmulHeuristicsTarget.GENERIC,
        flags=heuristics.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        gpu=getattr(heuristics.NvMatmulHeuristicsNvidiaGpu, _NAMES[gpu.key]),
    )
    layout = heuristics.NvMatmulHeuristicsMatmulLayout.NT_ROW_MAJOR
    problem = interface.makeNvMatmulHeuristicsProblem(M, N, K, layout)
    found = interface.get(problem, _CANDIDATES, precision="TST")
    return min(candidate["runtime"] for candidate in found)


__all__ = ["installed", "vendor_estimate"]
