"""Faults planted in the Hopper kernel's PTX: each is reported or shows in the result.

The run has two tiles of y per block, more chunks than stages, a mask and a rank that is no multiple
of 64, in a cluster of two blocks; M leaves rows of the last tile empty.
"""

import re
from collections.abc import Callable

import pytest

from tests.contract import assert_within_contract
from tests.cuda.test_hopper import HOPPER, operands, taken
from tests.cuda.test_operators import BF16, SEED, eager, oracle, run

ARGUMENTS = (*operands(300, 136, 200, 88, BF16, False), None, 0.3, SEED)


def replace(pattern: str, new: str, *, last: int = 0) -> Callable[[str], str]:
    """An edit of every match of `pattern`, or of the `last` ones; there must be some."""

    def edit(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        assert len(matches) >= max(last, 1), f"{pattern} is not in the code"
        for match in reversed(matches[-last:]):
            text = text[: match.start()] + match.expand(new) + text[match.end() :]
        return text

    return edit


def both(*edits: Callable[[str], str]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


WAIT = r"mbarrier\.try_wait\.parity\S+ complete, \[%r\d+\], %r\d+;"
NO_WAIT = "setp.eq.u32 complete, 0, 0;"
CLUSTER_BARRIER = r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;"
RELAXED = r"barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;"
EXPECT = r"(mbarrier\.arrive\.expect_tx\S+ _, \[%r\d+\]), %r\d+;"
STAGE_BYTES = 49152
EMPTY_COUNT = r"(mov\.u32 \s*%r\d+), 16;(?=[^;]*mbarrier\.init)"


def without_waits(first: int, count: int) -> Callable[[str], str]:
    """Without the waits that stand at these places in the code."""

    def edit(text: str) -> str:
        matches = list(re.finditer(WAIT, text))[first:][:count]
        for match in reversed(matches):
            text = text[: match.start()] + NO_WAIT + text[match.end() :]
        return text

    return edit


# In the code of the mask, of the consumers and of the loader, in this order.
MASK_EMPTY, FIRST_FULL, MASK_FULL = 0, 1, 6

FAULTS = {
    "nobody waits for the last accesses of the other block": (
        replace(CLUSTER_BARRIER, "", last=1),
        "RaceError",
    ),
    "a last barrier that releases nothing": (replace(CLUSTER_BARRIER, RELAXED, last=1), "noted"),
    "barriers that are not published": (
        both(replace(r"fence\.mbarrier_init\S+", ""), replace(CLUSTER_BARRIER, RELAXED)),
        "RaceError",
    ),
    "half of W for one block only": (
        replace(r"(mov\.u16 \s*%rs\d+), 3;", r"\1, 1;"),
        "DeadlockError",
    ),
    "half of W for a third block": (
        replace(r"(mov\.u16 \s*%rs\d+), 3;", r"\1, 7;"),
        "ExecutionError",
    ),
    "stages released in one block only": (
        replace(r"(mapa\S+ there, %r\d+), %r\d+;", r"\1, 0;"),
        "DeadlockError",
    ),
    "too few arrivals release a stage": (replace(EMPTY_COUNT, r"\1, 8;"), "DeadlockError"),
    "too many arrivals to release a stage": (replace(EMPTY_COUNT, r"\1, 32;"), "DeadlockError"),
    "the loader does not wait": (replace(WAIT, NO_WAIT, last=2), "RaceError"),
    "the first chunk is not waited for": (without_waits(FIRST_FULL, 4), "UninitializedRead"),
    "the mask is not waited for": (without_waits(MASK_FULL, 1), "RaceError"),
    "the mask is overwritten": (without_waits(MASK_EMPTY, 1), "DeadlockError"),
    "too few bytes are waited for": (
        replace(EXPECT, rf"\1, {STAGE_BYTES - 8192};"),
        "DeadlockError",
    ),
    "too many bytes are waited for": (
        replace(EXPECT, rf"\1, {STAGE_BYTES + 8192};"),
        "DeadlockError",
    ),
    "no fence before products": (replace(r"wgmma\.fence\S+", ""), "ExecutionError"),
    "products are not waited for": (replace(r"wgmma\.wait_group\S+ 0;", ""), "RaceError"),
    "a stage is released before it was read": (
        replace(r"(wgmma\.wait_group\S+) 1;", r"\1 2;"),
        "RaceError",
    ),
    "no fence between stores and their copy": (
        replace(r"fence\.proxy\.async\S+", ""),
        "RaceError",
    ),
    "a slice is overwritten while it is copied": (
        replace(r"cp\.async\.bulk\.wait_group\.read 2;", ""),
        "RaceError",
    ),
    "a block ends before its stores": (
        replace(r"cp\.async\.bulk\.wait_group 0;", "exit;"),
        "ExecutionError",
    ),
    "panels at the wrong stride": (
        replace(str(1 << 62 | 64 << 32 | 1 << 16), str(1 << 62 | 32 << 32)),
        "wrong result",
    ),
    "slices in another order of chunks": (
        replace(r"(and\.b32 \s*%r\d+, %r\d+), 3;", r"\1, 1;", last=1),
        "wrong result",
    ),
    "the mask keeps what it should drop": (
        replace(r"setp\.le\.u32( \s*%p\d+, %r\d+, %r\d+);", r"setp.gt.u32\1;"),
        "wrong result",
    ),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_fault(fault, simulator, monkeypatch):
    edit, expected = FAULTS.get(fault, (lambda text: text, "right"))
    changed = {
        name: edit(text)
        for name, text in simulator._texts.items()
        if re.search("hopper_expand_kernel.*bfloat16Lb0ELi256E", name)
    }
    assert len(changed) == 1
    monkeypatch.setattr(simulator, "_texts", simulator._texts | changed)
    assert outcome(simulator) == expected


def outcome(simulator) -> str:
    """What becomes of a run: the name of the error, "noted", "wrong result" or "right"."""
    try:
        (y,), (launch,) = run(simulator, "expand", *ARGUMENTS, capability=HOPPER, max_steps=300_000)
    except Exception as error:
        return type(error).__name__
    assert taken(launch) == 256
    if launch.stats.notes:
        return "noted"
    try:
        assert_within_contract(y, *eager("expand", *ARGUMENTS), *oracle("expand", *ARGUMENTS))
    except AssertionError:
        return "wrong result"
    return "right"
