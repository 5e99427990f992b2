"""What a compiled kernel asks of a multiprocessor, counted from its SASS.

`cuobjdump`, which comes with Triton, disassembles the cubin. A backward branch closes a loop; every
instruction counts to the innermost loop around it, or to the part that runs once (for a persistent
kernel: once a tile). Three sums per part, each for a whole block:

    flops   of tensor-core instructions: HMMA.16816 is 16×8×16, once a warp; HGMMA.64x256x16 is
            64×256×16, once for four warps; tf32, at half the rate of 16 bits, counts twice
    slots   instructions issued, one per warp; predicated ones take their slot as well
    bytes   between the multiprocessor and its shared memory: loads, stores, asynchronous copies,
            operands of HGMMA. Copies by TMA are not in the instruction; see `limits.py`
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\S*\s+(?:\S+,\s*)*(?:`\(\S+\)|0x([0-9a-f]+))")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_HMMA_FLOPS = {"16816": 4096, "1688": 2048, "1684": 1024}
_SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDGSTS)\b")


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count(sass: str, num_warps: int) -> tuple[list[int], list[list[int]]]:
    """The sums [flops, slots, bytes] of the part that runs once, and of each loop in order."""
    code = list(_instructions(sass))
    loops = sorted(_loops(code))
    once, inside = [0, 0, 0], [[0, 0, 0] for _ in loops]
    skipped = list(_skipped(code, loops))
    for address, text in code:
        text = _PREDICATE.sub("", text)
        around = [i for i, (first, last) in enumerate(loops) if first <= address <= last]
        if any(first <= address < last for first, last in skipped):
            around = []
        sums = inside[around[-1]] if around else once
        for i, number in enumerate(demands(text, num_warps)):
            sums[i] += number
    return once, inside


def demands(text: str, num_warps: int) -> tuple[int, int, int]:
    """[flops, slots, bytes] of one instruction for a block."""
    flops = moved = 0
    name, _, operands = text.partition(" ")
    if name.startswith("HMMA"):
        flops = _HMMA_FLOPS[name.split(".")[1]] * num_warps
    elif name.startswith("HGMMA"):
        rows, columns, depth = map(int, name.split(".")[1].split("x"))
        groups = num_warps // 4
        flops = 2 * rows * columns * depth * groups
        from_shared = re.match(r"\s*\S+,\s*gdesc", operands)  # A is, as B always is
        itemsize = 4 if "TF32" in name else 2
        moved = itemsize * depth * (columns + (rows if from_shared else 0)) * groups
    elif _SHARED.match(name):
        moved = 32 * _bytes_of_a_thread(name) * num_warps
    if "TF32" in name:
        flops *= 2
    return flops, num_warps, moved


def _bytes_of_a_thread(name: str) -> int:
    if "SM." in name:  # matrices of 8×8 elements of 16 bits, 4 bytes per thread each
        return 4 * int(re.search(r"\.M\w*88(?:\.(\d))?", name).group(1) or 1)
    width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", name)
    if width is None:
        return 4
    text = width.group(1)
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(text) or int(text) // 8


def _instructions(sass: str) -> Iterator[tuple[int, str]]:
    for line in sass.splitlines():
        found = _LINE.match(line)
        if found and found.group(2) != "NOP":
            yield int(found.group(1), 16), found.group(2)


def _skipped(
    code: list[tuple[int, str]], loops: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Spans of loops that a forward branch skips and that multiply nothing.

    In a loop that Triton merged from one over tiles and one over steps they are what runs once a
    tile: its indices before the first step, its result after the last.
    """
    for address, text in code:
        found = _BRANCH.match(_PREDICATE.sub("", text))
        end = int(found.group(1), 16) if found and found.group(1) else 0
        within = any(first <= address and end <= last for first, last in loops)
        inside = [t for at, t in code if address < at < end]
        if end > address and within and not any("MMA" in instruction for instruction in inside):
            yield address + 1, end


def _loops(code: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """First and last address of each loop; of several branches to one start the last.

    Behind the kernel's exit lie the waits on barriers that were not through at the first look,
    which branch back into the middle of other loops.
    """
    ends: dict[int, int] = {}
    last_exit = max((address for address, text in code if text == "EXIT"), default=code[-1][0])
    for address, text in code:
        if address > last_exit:
            break
        found = _BRANCH.match(_PREDICATE.sub("", text))
        if found and found.group(1) and int(found.group(1), 16) < address:
            ends[int(found.group(1), 16)] = address
    yield from ends.items()


__all__ = ["CUOBJDUMP", "count", "demands", "disassemble"]
