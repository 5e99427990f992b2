"""GEMMs that others have published, against the model: its error on known results.

`published_gemms.json` holds the numbers with their sources. The vendor's are predicted as
`hardware.gemm`, Triton's as this library's fused kernel without a rank, in the best of its tiles.
No rate was fitted to them: what the model knows of a device is from other sources
(`hardware/gpus.py`). Its form was not blind to them; the page says what was added after a look.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import GPUS, Gpu
from lorasb_kernels.profiling.layer_time import fused

PATH = Path(__file__).with_name("published_gemms.json")


@dataclass(frozen=True)
class Comparison:
    """One published GEMM: sizes, published and predicted seconds."""

    table: str
    sizes: tuple[int, int, int]
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published, minus one."""
        return self.predicted / self.published - 1


def comparisons() -> list[Comparison]:
    """All published GEMMs with their predictions."""
    found = []
    for table in json.loads(PATH.read_text())["tables"]:
        gpu = GPUS[table["gpu"]]
        if table["launch_us"]:  # not in a CUDA graph
            rates = dataclasses.replace(gpu.rates, launch=1e-6 * table["launch_us"])
            gpu = dataclasses.replace(gpu, rates=rates)
        for *sizes, number in table.get("tflops") or table["share_of_peak"]:
            rate = number * 1e12 * table.get("peak_tflops", 1)
            M, N, K = sizes
            published = 2 * M * N * K / rate
            predicted = _predict(gpu, table["predicted_as"], M, N, K)
            name = f"{gpu.key}, {table['contender']}"
            found.append(Comparison(name, (M, N, K), published, predicted))
    return found


def _predict(gpu: Gpu, way: str, M: int, N: int, K: int) -> float:
    if way == "gemm":
        return gemm(gpu, M, N, K).total
    return fused(gpu, M, N, K, 0, False, way)[0].limits.total


def sources() -> list[tuple[str, str]]:
    """Each table and where it is from."""
    tables = json.loads(PATH.read_text())["tables"]
    return [(f"{table['gpu']}, {table['contender']}", table["source"]) for table in tables]


def summary(found: list[Comparison]) -> tuple[float, float]:
    """Median and largest size of the errors."""
    sizes = [abs(comparison.error) for comparison in found]
    return median(sizes), max(sizes)


__all__ = ["PATH", "Comparison", "comparisons", "sources", "summary"]
