"""The counters of arriving blocks: zeroed once, left at zero, of one stream or capture alone."""

import contextlib
import subprocess
import sys

import pytest
import torch

from tests.cuda.simulator import Simulator
from tests.cuda.test_operators import CASES, run
from tests.ops.operands import same_bits

SPLITTING = ("shrink", "shrink_group", "core_backward")


def zeroing(operation, simulator, **options) -> int:
    """How often one call makes zeros. It has no memset: the simulated runtime has none."""
    with torch.autograd.profiler.profile() as profile:
        run(simulator, operation, *CASES[operation](), multiprocessors=8, **options)
    return sum(event.name == "aten::new_zeros" for event in profile.function_events)


@pytest.mark.parametrize("operation", SPLITTING)
def test_a_call_leaves_the_counters_at_zero_and_sets_none(operation, simulator):
    arguments = CASES[operation]()
    first, launches = run(simulator, operation, *arguments, multiprocessors=8)
    assert launches[0].grid[1] > 1, "no split"
    assert zeroing(operation, simulator) == 0
    again, _ = run(simulator, operation, *arguments, multiprocessors=8)
    assert all(map(same_bits, first, again))


def test_each_capture_has_counters_of_its_own_until_there_are_none_left(toolkit):
    """Then a call zeroes its own, and the results stay the same. In a process that ends with it."""
    code = "from tests.cuda import test_arrivals as own; own.use_all_counters()"
    subprocess.run([sys.executable, "-c", code], check=True)


def use_all_counters() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    simulator = Simulator()
    operation, arguments = "shrink", CASES["shrink"]()
    expected, _ = run(simulator, operation, *arguments, multiprocessors=8)
    assert zeroing(operation, simulator, capture=1) == 0
    for capture in range(2, 300):
        options = {"multiprocessors": 8, "refuse": True, "capture": capture}
        with contextlib.suppress(RuntimeError), simulator.running(**options):
            torch.ops.lorasb.shrink_cuda(*arguments)
    assert zeroing(operation, simulator, capture=1) == 0
    assert zeroing(operation, simulator, capture=300) == 1
    found, _ = run(simulator, operation, *arguments, multiprocessors=8, capture=301)
    assert all(map(same_bits, expected, found))


def test_a_first_call_that_is_captured_zeroes_its_own(toolkit):
    """Nothing that outlives a call can be made during a capture."""
    code = """
from tests.cuda import test_arrivals as own
simulator = own.Simulator()
assert own.zeroing("shrink", simulator, capture=1) == 1
assert own.zeroing("shrink", simulator) == 1
assert own.zeroing("shrink", simulator, capture=1) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
