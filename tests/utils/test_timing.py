"""The timing core takes turns and the clock replays; how long anything takes is not asserted."""

import pytest
import torch

from bench.recording import Case, Measurement, ReplayClock, rows
from lorasb_kernels.profiling.costs import Cost
from lorasb_kernels.profiling.roofline import Ceilings
from lorasb_kernels.utils.timing import copies_past_cache, interleave, peak_bytes, quantiles

CPU = torch.device("cpu")


def test_contenders_take_turns_and_each_goes_first():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    samples = interleave(calls, CPU, rounds=3, burst_seconds=0)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys("abc", 3)
    timed = order[-9:]
    assert [name for name, _ in timed] == list("abcbcacab")
    assert [i for _, i in timed] == list(range(9))


def test_quantiles():
    found = quantiles([float(i) for i in range(11)])
    assert found == {"p10": 1.0, "p50": 5.0, "p90": 9.0}
    assert quantiles([3.0]) == {"p10": 3.0, "p50": 3.0, "p90": 3.0}


def test_a_cpu_has_no_device_memory_and_rotates_nothing():
    assert peak_bytes(lambda i: None, CPU) is None
    assert copies_past_cache(1, CPU) == 1


def test_the_clock_replays_durations():
    clock = ReplayClock()
    clock.load([0.5, 0.25])
    before = clock()
    clock.advance()
    assert clock() - before == 0.5
    clock.advance()
    assert clock() - before == 0.75


def test_rows_of_a_measurement():
    measured = Measurement(
        [1e-3] * 5, launches=[Cost(bytes=1e6, flops=2e9)], saved=12, others=[("blocks", 3, "1")]
    )
    case = Case("linear.both", "x", 8, 4, "bfloat16")
    found = rows(case, "me", measured, Ceilings(bandwidth=1e10, rate=4e12, source="measured"))
    value = {(row.quantity, row.quantile): (row.value, row.unit) for row in found}
    assert value[("time", "p50")] == (1000.0, "us")
    assert value[("bandwidth", "p50")] == (1.0, "GB/s")
    assert value[("rate", "p50")] == (2.0, "TFLOP/s")
    assert value[("roofline_share", "p50")] == (0.5, "1")
    assert value[("saved_memory", "")] == (12, "bytes")
    assert value[("blocks", "")] == (3, "1")
    assert ("peak_memory", "") not in value
    assert all(row.contender == "me" and row.tokens == 8 for row in found)


@pytest.mark.parametrize("missing", ["launches", "ceilings"])
def test_nothing_is_made_up(missing):
    launches = [] if missing == "launches" else [Cost(1, 1)]
    ceilings = None if missing == "ceilings" else Ceilings(1.0, 1.0, "")
    found = rows(Case("a", "b", 1, 1, "c"), "me", Measurement([1.0], launches), ceilings)
    assert "roofline_share" not in {row.quantity for row in found}
