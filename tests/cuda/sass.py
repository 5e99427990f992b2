"""The machine code of the extension's kernels, as far as counts of instructions need it."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

RANK_PRODUCT = re.compile(
    r"RankProductTraitsI(?P<type>f|13__nv_bfloat16|6__half)Li(?P<rank>\d+)ELi(?P<warps_m>\d+)E"
    r"Li(?P<warps_n>\d+)ELi(?P<row_tiles>\d+)ELi(?P<stages>\d+)ELi(?P<blocks>\d+)E"
    r"LNS_8RankModeE(?P<mode>\d)E"
)


class RankProduct(NamedTuple):
    """The template arguments of a kernel of rank_product.cuh."""

    dtype: str
    rank: int
    warps_m: int
    warps_n: int
    row_tiles: int
    stages: int
    blocks: int
    mode: str

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps_m

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        first = 4 * self.rows * (self.rank + 8)  # exchanged between warps, in fp32
        exchanges = self.warps_n > 1 or self.dtype == "float32"
        return max(64 * self.stages * (self.rows + self.rank), first if exchanges else 0)


def rank_product(kernel: str) -> RankProduct | None:
    """The template arguments in a mangled name; None if it is another kernel's."""
    match = RANK_PRODUCT.search(kernel)
    if match is None:
        return None
    dtype = {"f": "float32", "6__half": "float16"}.get(match["type"], "bfloat16")
    names = ("rank", "warps_m", "warps_n", "row_tiles", "stages", "blocks")
    mode = ("forward", "dropout", "backward")[int(match["mode"])]
    return RankProduct(dtype, *(int(match[name]) for name in names), mode)


class Loop(NamedTuple):
    """The instructions of a loop without their operands, in order."""

    instructions: list[str]

    def count(self, opcode: str) -> int:
        return sum(name.startswith(opcode) for name in self.instructions)

    @property
    def opcodes(self) -> Counter:
        return Counter(name.split(".")[0] for name in self.instructions)


def loops_of(cubin: Path) -> dict[str, list[Loop]]:
    """The innermost loops of each kernel in a file of machine code."""
    command = [str(DISASSEMBLER), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in re.split(r"\.section\s+\.text\.", text)[1:]:
        kernels[re.match(r"\w+", section)[0]] = _innermost_loops(section)
    return kernels


def _innermost_loops(section: str) -> list[Loop]:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in section.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line
        ):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                spans.append((labels[target[1]], len(instructions)))
            instructions.append(found[1])
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]
    return [Loop(instructions[first : last + 1]) for first, last in inner]


def main_loop(loops: list[Loop], opcode: str) -> Loop:
    """The loop with the most instructions whose names start with `opcode`."""
    return max(loops, key=lambda loop: loop.count(opcode))


__all__ = ["Loop", "RankProduct", "loops_of", "main_loop", "rank_product"]
