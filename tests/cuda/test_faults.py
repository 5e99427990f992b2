"""Planted faults: the checks that the other tests rely on detect them.

A fault is an edit of a kernel's PTX, as if its source lacked a barrier or waited for the wrong
copy.
"""

import re

from tests.contract import assert_within_contract
from tests.cuda.test_operators import CPU, FP32, normal, planes_of, run

M, N, Q = 40, 300, 20


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
