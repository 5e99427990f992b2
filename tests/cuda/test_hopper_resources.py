"""What ptxas makes of the Hopper kernels: registers, shared memory and the loop over chunks."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from tests.cuda import simulator as simulation
from tests.cuda.test_build import kernels_in
from tests.cuda.test_hopper import HOPPER, operands, taken
from tests.cuda.test_operators import BF16, run

# Limits of a multiprocessor of sm_90.
REGISTERS, SHARED_BYTES = 65536, 227 * 1024
THREADS = 384


class Loop(NamedTuple):
    """An innermost loop of machine code that multiplies."""

    kernel: str
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, instruction) is not None for instruction in self.instructions)


# File, and the loops over chunks of each of its kernels: over the rank and over K; over tokens.
LOOPS = {"expand_sm90": 2, "sign_gradient_sm90": 1}


@pytest.fixture(scope="session", params=LOOPS)
def compiled(request, toolkit) -> Path:
    (path,) = [path for path in simulation.objects() if path.stem == request.param]
    return path


@pytest.fixture(scope="session")
def kernels(compiled) -> dict[str, dict[str, int]]:
    return kernels_in(compiled.with_suffix(".log").read_text())


@pytest.fixture(scope="session")
def loops(compiled) -> list[Loop]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", str(compiled.with_suffix(".cubin"))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [loop for part in listing.split("Function : ")[1:] for loop in multiplying_loops(part)]


def multiplying_loops(listing: str) -> list[Loop]:
    """The innermost loops of a kernel's machine code in which there is a wgmma (HGMMA)."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing)
    code = {int(address, 16): instruction for address, instruction in lines}
    branches = [
        (int(target[1], 16), address)
        for address, instruction in code.items()
        if (target := re.search(r"\bBRA (0x[0-9a-f]+)", instruction))
        and int(target[1], 16) <= address
    ]
    bodies = [
        (begin, end)
        for begin, end in branches
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in branches)
    ]
    name = listing.split(maxsplit=1)[0]
    loops = [Loop(name, [code[a] for a in sorted(code) if b <= a <= e]) for b, e in bodies]
    return [loop for loop in loops if loop.count("HGMMA")]


def test_registers_are_those_that_the_warpgroups_share_and_none_spills(compiled, kernels):
    assert kernels
    for kernel, resources in kernels.items():
        assert resources["stack"] == resources["stores"] == resources["loads"] == 0, kernel
        assert resources["registers"] * THREADS <= REGISTERS
    source = (simulation.build.SOURCE / "hopper" / f"{compiled.stem}.cu").read_text()
    (few,) = re.findall(r"shrink_registers_to<(\d+)>", source)
    (many,) = re.findall(r"grow_registers_to<(\d+)>", source)
    assert 128 * int(few) + 256 * int(many) <= REGISTERS


def test_no_product_waits_for_another(compiled):
    """ptxas says (C7510 and the like) when it had to wait between products or order them anew."""
    log = compiled.with_suffix(".log").read_text()
    assert "Compiling entry function" in log
    assert re.findall(r"\(C75\d\d\).*", log) == []
    assert "wgmma" not in log


def test_the_loop_over_chunks(loops, kernels, compiled):
    """Four products and one wait per chunk, nothing that waits for memory."""
    assert len(loops) == LOOPS[compiled.stem] * len(kernels)
    for loop in loops:
        assert loop.count("HGMMA") == 4, loop
        assert loop.count("WARPGROUP.DEPBAR") == 1, loop
        assert loop.count(r"SYNCS.*TRYWAIT") == 1, loop
        assert loop.count(r"SYNCS\.ARRIVE") == 1, loop
        assert loop.count("MEMBAR|LDL|STL|BAR\\.SYNC|LDS|STS|LDG") == 0, loop
        assert len(loop.instructions) <= 70, loop


@pytest.mark.parametrize("N", [136, 256])
def test_launches_fit_a_multiprocessor(N, simulator):
    arguments = (*operands(20, N, 32, 8, BF16, False), None, 0.0, None)
    _, (launch,) = run(simulator, "expand", *arguments, capability=HOPPER)
    assert taken(launch)
    assert launch.threads == THREADS
    assert launch.shared_bytes <= SHARED_BYTES
