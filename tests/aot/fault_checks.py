"""Faults planted in the kernels' PTX: what the other checks rely on sees each of them.

A fault is an edit of the compiled code, as if the source had lacked a mask or the compiler a
barrier. Every one must raise the error that names it; without any, the same launch passes.
"""

import re
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch

import ptxcheck
from lorasb_kernels.ops.triton.core_backward import core_backward
from lorasb_kernels.ops.triton.expand import fused_expand
from lorasb_kernels.ops.triton.expand_descriptor import descriptor_expand
from lorasb_kernels.ops.triton.projection import project
from lorasb_kernels.ops.triton.sign_matmul import sign_matmul
from lorasb_kernels.ops.triton.tiles import ExpandTile, expand_tile
from lorasb_kernels.ops.triton.weight_gradient import sign_accumulate
from tests.aot.emulator import emulated
from tests.aot.ptx_checks import (
    BF16,
    CPU,
    SCALING,
    bf16,
    core_of,
    expand_arguments,
    shrink_arguments,
)
from tests.ops.operands import normal
from tests.ops.test_sign_matmul import signs

DESCRIBED = ExpandTile(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)


# Rows are multiples of 16 elements, as in models: 16-byte copies, kept in flight.
def split_shrink(arch: str) -> None:
    project(*shrink_arguments(75, 912, 32))


def backward(arch: str) -> None:
    core_backward(bf16(75, 208), bf16(75, 32, seed=1), bf16(208, 32, seed=2), core_of(32), SCALING)


def expand(arch: str) -> None:
    fused_expand(*expand_arguments(75, 144, 208, 32, False, 0.0), expand_tile(arch, BF16, False))


def described_expand(arch: str) -> None:
    descriptor_expand(*expand_arguments(75, 136, 208, 40, False, 0.0), DESCRIBED)


def accumulate(arch: str) -> None:
    sign_accumulate(torch.zeros(80, 48), bf16(75, 80), bf16(75, 48, seed=1), None)


def sign_product(arch: str) -> None:
    S, Z = signs(70, 160, CPU), normal(160, 32, dtype=torch.float32, device=CPU)
    sign_matmul(S.positive, S.negative, Z, 160, False)


class Fault(NamedTuple):
    """An edit of PTX, every match of `pattern` becoming `new`, and the error it must raise."""

    pattern: str
    new: str
    error: type[Exception]
    message: str


NO_BARRIER = Fault(r"bar\.sync\s+0;", "", ptxcheck.RaceError, "shared memory race")
STORE_WITHOUT_MASK = Fault(
    r"@%p\d+ (st\.global)",
    r"\1",
    ptxcheck.ExecutionError,
    "out-of-bounds global access|two blocks store",
)
COPY_WITHOUT_MASK = Fault(
    r"(cp\.async\.c[ag]\.shared\.global [^;]*?, 0x\w+), %r\d+;",
    r"\1;",
    ptxcheck.MemoryFault,
    "out-of-bounds global access",
)
COPY_NOT_WAITED_FOR = Fault(
    r"cp\.async\.wait_group\s+\d;",
    "cp.async.wait_group 7;",
    ptxcheck.UninitializedRead,
    "copy still in flight",
)
MISALIGNED_STORE = Fault(
    r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0", r"\g<1>4", ptxcheck.MemoryFault, "misaligned access"
)
# All but the last-arriving block of a row tile finish it, before the partial sums are there.
TOO_EARLY_TO_FINISH = Fault(
    r"(ld\.shared\.b32\s+(%r\d+), \[global_smem\];(?:.|\n)*?setp\.)ne(\.b32\s+%p\d+, \2)",
    r"\1eq\3",
    ptxcheck.RaceError,
    "two blocks store",
)
NO_PROXY_FENCE = Fault(
    r"fence\.proxy\.async[^;]*;", "", ptxcheck.RaceError, r"missing fence\.proxy\.async"
)
NO_WGMMA_FENCE = Fault(
    r"wgmma\.fence[^;]*;", "", ptxcheck.ExecutionError, r"no wgmma\.fence before"
)
NO_WGMMA_WAIT = Fault(
    r"wgmma\.wait_group[^;]*;", "", ptxcheck.RaceError, "not known to be complete"
)
STAGE_NOT_WAITED_FOR = Fault(  # the other parity: of the phase before
    r"(mbarrier\.try_wait\.parity\S+ complete, \[%r\d+\]), (%r\d+);",
    r"xor.b32 \2, \2, 1; \1, \2; xor.b32 \2, \2, 1;",
    ptxcheck.UninitializedRead,
    "copy still in flight",
)
TOO_MANY_BYTES_EXPECTED = Fault(
    r"(arrive\.expect_tx\S+ _, \[%r\d+\]), \d+;",
    r"\1, 99984;",
    ptxcheck.DeadlockError,
    "transaction",
)
STORE_NOT_WAITED_FOR = Fault(  # the next half of the tile overwrites it
    r"cp\.async\.bulk\.wait_group[^;]*;", "", ptxcheck.RaceError, "write after read"
)
COMMON = {
    split_shrink: (
        NO_BARRIER,
        STORE_WITHOUT_MASK,
        COPY_WITHOUT_MASK,
        COPY_NOT_WAITED_FOR,
        MISALIGNED_STORE,
        TOO_EARLY_TO_FINISH,
    ),
    backward: (NO_BARRIER, COPY_NOT_WAITED_FOR),
    expand: (NO_BARRIER, STORE_WITHOUT_MASK, COPY_WITHOUT_MASK, COPY_NOT_WAITED_FOR),
    accumulate: (NO_BARRIER, STORE_WITHOUT_MASK, COPY_NOT_WAITED_FOR),
    sign_product: (NO_BARRIER, STORE_WITHOUT_MASK, COPY_WITHOUT_MASK, COPY_NOT_WAITED_FOR),
}
WGMMA = (NO_PROXY_FENCE, NO_WGMMA_FENCE, NO_WGMMA_WAIT)
HOPPER = {
    split_shrink: WGMMA,
    expand: WGMMA,
    accumulate: WGMMA,
    described_expand: (
        *WGMMA,
        NO_BARRIER,
        STAGE_NOT_WAITED_FOR,
        TOO_MANY_BYTES_EXPECTED,
        STORE_NOT_WAITED_FOR,
    ),
}


def raised_by(operation: Callable[[str], None], arch: str, fault: Fault) -> Exception | None:
    """What the operation raises with the fault in all of its kernels."""
    planted = 0

    def plant(text: str) -> str:
        nonlocal planted
        text, count = re.subn(fault.pattern, fault.new, text)
        planted += count
        return text

    try:
        with emulated(arch, plant=plant):
            operation(arch)
    except Exception as error:
        return error
    finally:
        assert planted, f"{fault.pattern} is not in the code of {operation.__name__}"
    return None


def check_faults(arch):
    """Each fault raises its error; without one the operation passes."""
    tables = [COMMON, HOPPER] if arch == "sm_90" else [COMMON]
    for operation in dict.fromkeys(chain(*tables)):
        with emulated(arch):
            operation(arch)
    for operation, faults in chain(*(table.items() for table in tables)):
        for fault in faults:
            error = raised_by(operation, arch, fault)
            seen = isinstance(error, fault.error) and re.search(fault.message, str(error))
            assert seen, f"{operation.__name__} without {fault.pattern}: {error!r}"
