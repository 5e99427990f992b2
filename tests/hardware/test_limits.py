"""The arithmetic of the model, by hand; and that it holds its own bounds."""

import dataclasses
import math

import pytest

from lorasb_kernels.hardware.counts import Demand
from lorasb_kernels.hardware.gemm import gemm, operand_traffic
from lorasb_kernels.hardware.gpus import GPUS, RATES, Gpu, Rates
from lorasb_kernels.hardware.limits import LIMITS, THROUGHPUT, Part, Work, limits, total

# 10 multiprocessors of 1024 flops a clock, at 1 GHz under load.
TOY = Gpu(
    key="toy",
    device_name="toy",
    arch="sm_80",
    multiprocessors=10,
    memory_gb=1,
    l2_bytes=1 << 20,
    clock=1.25e9,
    bandwidth=1e12,
    tensor_rate=12.8e12,
    fp32_rate=1e12,
    source="",
    rates=Rates(tensor=10.24e12, bandwidth=0.8e12, l2=4e12, latency=1e-6, launch=2e-6, stall=0),
    rates_source=("",) * 5,
)


def work(**changes) -> Work:
    base = Work(
        blocks=20,
        resident=1,
        warps=4,
        parts=(Part(Demand(1.024e6, 400, 12800), 8), Part(Demand(0, 40, 0), 1)),
        in_flight=2,
        memory_bytes=1.6e6,
        l2_bytes=1.6e7,
    )
    return dataclasses.replace(base, **changes)


def test_each_limit_is_its_demand_over_its_rate():
    found = limits(work(), TOY)
    assert TOY.clock_under_load == pytest.approx(1e9)
    assert found.memory == pytest.approx(2e-6)
    assert found.l2 == pytest.approx(4e-6)
    assert found.tensor == pytest.approx(20 * 8 * 1000 / 10 / 1e9)
    assert found.issue == pytest.approx(20 * (8 * 400 + 40) / 4 / 10 / 1e9)
    assert found.shared == pytest.approx(20 * 8 * 12800 / 128 / 10 / 1e9)
    assert found.launch == 2e-6


def test_a_block_more_than_the_others_is_a_wave():
    even, odd = limits(work(), TOY), limits(work(blocks=21), TOY)
    one_block = 8e-6 + 10e-9  # 8 steps of 1 µs, then 40 slots
    assert even.floor + even.waves == pytest.approx(2 * one_block)
    assert odd.floor + odd.waves == pytest.approx(3 * one_block)


def test_latency_bounds_a_step_and_is_exposed_at_the_ends():
    fast = Part(Demand(1e3), 8)
    found = limits(work(blocks=10, parts=(fast,), memory_bytes=0, l2_bytes=0), TOY)
    assert found.total == pytest.approx(8 * 0.5e-6 + 2 * 1e-6 + 2e-6)
    assert found.bound == "latency"
    deeper = limits(work(blocks=10, parts=(fast,), in_flight=8, memory_bytes=0, l2_bytes=0), TOY)
    assert deeper.total == pytest.approx(8 * 0.125e-6 + 2e-6 + 2e-6)


def test_a_step_stalls_unless_another_block_runs():
    gpu = dataclasses.replace(TOY, rates=dataclasses.replace(TOY.rates, stall=200))
    for resident in (1, 2):
        case = work(resident=resident, blocks=20)
        stalled = limits(case, gpu).total - limits(case, TOY).total
        assert stalled == pytest.approx({1: 2, 2: 0.5}[resident] * 8 * 200e-9)
    assert limits(work(stalls=False), gpu) == limits(work(stalls=False), TOY)


def test_what_runs_once_runs_one_instruction_after_another():
    parts = (Part(Demand(0, 4000), 1),)
    alone = limits(work(blocks=10, parts=parts, memory_bytes=0, l2_bytes=0, turns=0), TOY)
    assert alone.latency == pytest.approx(1000 * 4e-9)  # per warp, 4 clocks each
    many = limits(work(blocks=40, resident=2, parts=parts, turns=0), TOY)
    assert many.latency == pytest.approx(1.5 * 1000 * 4e-9)  # two rounds, half of the second hidden


def test_a_sum_keeps_the_total():
    parts = [limits(work(), TOY), limits(work(memory_bytes=1e9), TOY)]
    assert total(parts).total == pytest.approx(sum(part.total for part in parts))


@pytest.mark.parametrize("key", GPUS)
def test_a_gemm_is_never_faster_than_the_roofline(key):
    gpu = GPUS[key]
    for M, N, K in ((1, 1, 1), (512, 4096, 4096), (8192, 96, 4096), (8192, 4096, 96), (77, 300, 9)):
        found = gemm(gpu, M, N, K)
        moved = 2 * (M * K + K * N + M * N)
        assert found.total > max(moved / gpu.bandwidth, 2 * M * N * K / (1.1 * gpu.tensor_rate))
        assert all(getattr(found, name) >= 0 for name in LIMITS)
        assert gemm(gpu, M, N, K, adds=True).total >= found.total


def test_a_large_gemm_runs_at_the_sustained_rate():
    for gpu in GPUS.values():
        flops = 2 * 16384**3
        assert flops / gemm(gpu, 16384, 16384, 16384).total > 0.9 * gpu.rates.tensor


def test_operands_beyond_l2_are_read_again():
    sizes, tile = (8192, 8192, 8192), (128, 128)
    once = 2 * 2 * 8192**2
    large = dataclasses.replace(TOY, l2_bytes=1 << 40)
    assert operand_traffic(large, sizes, tile, 64, 2) == once
    assert operand_traffic(TOY, sizes, tile, 64, 2) == 8 * once  # 8×8 tiles of 64×64 at a time
    assert operand_traffic(TOY, sizes, tile, 64, 2, down=64) == 2 * 8192**2 * (64 + 1)


def test_every_rate_has_a_source_and_is_below_the_datasheet():
    for gpu in GPUS.values():
        assert len(gpu.rates_source) == len(RATES) - 1
        assert all(gpu.rates_source)
        assert gpu.rates.bandwidth < gpu.bandwidth < gpu.rates.l2
        assert gpu.rates.tensor < 1.1 * gpu.tensor_rate
        assert gpu.flops_per_clock in (512, 1024, 2048, 4096)
        assert math.isclose(
            gpu.flops_per_clock * gpu.clock * gpu.multiprocessors, gpu.tensor_rate, rel_tol=0.01
        )
    assert LIMITS[:5] == THROUGHPUT
