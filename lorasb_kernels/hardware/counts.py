"""Counts of compiled kernels: what a block of each asks of its multiprocessor, by case and tile.

`sass_counts.json` is written by `python -m bench.kernel_resources.counts` from the SASS.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("sass_counts.json")


@dataclass(frozen=True)
class Demand:
    """What a block asks for in one pass through a part of its code.

    Args:
        flops: of the tensor cores, 16-bit products; tf32 counts twice.
        slots: warp instructions.
        bytes: to and from shared memory.
    """

    flops: float
    slots: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Counts:
    """A compiled kernel: blocks that fit on a multiprocessor, and its demands by part.

    `wgmma` says that its products are Hopper's warpgroup instructions.
    """

    blocks: int
    once: Demand
    loops: tuple[Demand, ...]
    wgmma: bool


def key(kernel: str, case: str, tile: object) -> str:
    """The name of an entry."""
    return f"{kernel} | {case} | {tile}"


@functools.cache
def _entries() -> dict[str, dict[str, dict]]:
    return json.loads(PATH.read_text(encoding="utf-8"))["counts"]


@functools.cache
def counts_of(arch: str, kernel: str, case: str, tile: object) -> Counts | None:
    """The counts of a kernel; None for one that was not counted, which includes all of fp32."""
    entry = _entries().get(arch, {}).get(key(kernel, case, tile))
    if entry is None:
        return None
    loops = tuple(Demand(*loop) for loop in entry["loops"])
    return Counts(entry["blocks"], Demand(*entry["once"]), loops, entry.get("wgmma", False))


__all__ = ["PATH", "Counts", "Demand", "counts_of", "key"]
