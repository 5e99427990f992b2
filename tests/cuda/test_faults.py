"""Planted faults: the checks that the other tests rely on detect them.

A fault is an edit of a kernel's PTX, as if its source lacked a barrier or waited for the wrong
copy.
"""

import itertools
import re

import pytest

from tests.contract import assert_within_contract
from tests.cuda.test_operators import CASES, CPU, FP32, normal, planes_of, run
from tests.ops.operands import eager, oracle

M, N, Q = 40, 300, 20
CAPTURES = itertools.count(10**6)


def outcome(simulator, monkeypatch, edit) -> str:
    """Runs `sign_matmul` with its PTX edited; the name of the error, or of the wrong result."""
    texts = {
        name: edit(text) if "sign_matmul" in name else text
        for name, text in simulator._texts.items()
    }
    monkeypatch.setattr(simulator, "_texts", texts)
    signs, positive, negative = planes_of(M, N)
    dense = normal(N, Q, dtype=FP32, device=CPU)
    try:
        (out,), _ = run(simulator, "sign_matmul", positive, negative, dense, N, False)
    except Exception as error:
        return type(error).__name__
    try:
        assert_within_contract(out, signs @ dense, signs.double() @ dense.double())
    except AssertionError:
        return "wrong result"
    return "passed"


def test_the_kernel_without_a_fault_passes(simulator, monkeypatch):
    assert outcome(simulator, monkeypatch, lambda text: text) == "passed"


def test_a_missing_barrier_is_a_race(simulator, monkeypatch):
    def edit(text):
        assert "bar.sync" in text
        return re.sub(r"bar\.sync\s+0;", "", text)

    assert outcome(simulator, monkeypatch, edit) == "RaceError"


def test_waiting_for_one_copy_too_few_is_seen(simulator, monkeypatch):
    def edit(text):
        assert "cp.async.wait_group 2;" in text
        return text.replace("cp.async.wait_group 2;", "cp.async.wait_group 3;")

    assert outcome(simulator, monkeypatch, edit) in ("UninitializedRead", "wrong result")


def test_a_dropped_bounds_check_is_a_memory_fault(simulator, monkeypatch):
    def edit(text):
        guard = r"@%p\d+ bra\s+\S+;(?=\s*(?:\.loc.*\s*)*st\.global)"
        assert re.search(guard, text)
        return re.sub(guard, "", text)

    assert outcome(simulator, monkeypatch, edit) == "MemoryFault"


def test_an_element_left_unwritten_shows(simulator, monkeypatch):
    def edit(text):
        store = r"st\.global\.f32\s+\[\S+\], %f\d+;"
        assert re.search(store, text)
        return re.sub(store, "", text, count=1)

    assert outcome(simulator, monkeypatch, edit) == "wrong result"


@pytest.fixture
def faulty_shrink(simulator, monkeypatch):
    """Runs `shrink`, split over n, with its PTX edited; as `outcome`, but `calls` times.

    As in a capture of its own, as a fault may leave the counters of arrivals at anything.
    """

    def run_edited(edit, calls=1) -> str:
        texts = {
            name: edit(text) if "rank_product" in name else text
            for name, text in simulator._texts.items()
        }
        monkeypatch.setattr(simulator, "_texts", texts)
        arguments, capture = CASES["shrink"](), next(CAPTURES)
        own, exact = eager("shrink", *arguments), oracle("shrink", *arguments)
        try:
            for _ in range(calls):
                found, launches = run(
                    simulator, "shrink", *arguments, multiprocessors=8, capture=capture
                )
                assert launches[0].grid[1] > 1
                for out, yardstick, ref in zip(found, own, exact, strict=True):
                    assert_within_contract(out, yardstick, ref)
        except AssertionError:
            return "wrong result"
        except Exception as error:
            return type(error).__name__
        return "passed"

    return run_edited


def test_the_split_shrink_without_a_fault_passes_again_and_again(faulty_shrink):
    assert faulty_shrink(lambda text: text, calls=3) == "passed"


def test_counters_that_are_not_reset_are_seen_at_the_next_call(faulty_shrink):
    def edit(text):
        assert "atom.global.inc" in text
        return text.replace("atom.global.inc", "atom.global.add")

    assert faulty_shrink(edit, calls=2) == "wrong result"


def test_a_split_that_waits_for_no_barrier_is_a_race(faulty_shrink):
    def edit(text):
        return re.sub(r"bar\.sync\s+0;", "", text)

    assert faulty_shrink(edit) == "RaceError"


def test_copies_past_the_end_of_a_row_are_seen(faulty_shrink):
    """The last step copies nothing past K; with the size of a whole chunk it would."""

    def edit(text):
        sized = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16), %r\d+;"
        assert re.search(sized, text)
        return re.sub(sized, r"\1, 16;", text)

    assert faulty_shrink(edit) in ("MemoryFault", "UninitializedRead", "wrong result")
