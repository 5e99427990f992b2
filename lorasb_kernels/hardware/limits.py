"""How long a launch takes on a GPU: the time of each limit, and what is left exposed between them.

A launch is a number of equal blocks. What they ask for in total, over what the device sustains,
gives the time of a limit as if nothing else limited: device memory, L2, tensor cores, instruction
issue, shared memory. The largest is a floor. Three things come on top:

    waves     blocks come in whole numbers: a multiprocessor with one block more than the others
              sets the time; and the parts of a block run one after another, each at its own limit
    latency   a step of a loop cannot be shorter than the latency of device memory divided by the
              steps in flight, and stalls between its parts unless other blocks run meanwhile; the
              first loads and the last stores of a block, and what its warps execute once, one
              instruction after another, overlap with nothing but the other blocks of the
              multiprocessor
    launch    between two kernels of a CUDA graph

The roofline (Williams, Waterman, Patterson 2009) is the larger of `memory` and `tensor` at the
datasheet's rates.
"""

import math
from dataclasses import dataclass, fields

from lorasb_kernels.hardware.counts import Demand
from lorasb_kernels.hardware.gpus import Gpu

# Per clock and multiprocessor, compute capability 8.0 to 12.0 (CUDA programming guide, arithmetic
# instructions and shared memory): four schedulers issue one instruction each; 32 banks of 4 bytes.
ISSUE_SLOTS = 4
SHARED_BYTES = 128
# Clocks from an instruction to one that needs its result (Jia et al., arXiv:1804.06826, section on
# instruction latencies).
DEPENDENT_ISSUE = 4
# What mma.sync reaches of wgmma's rate on sm_90 (arXiv:2402.13499, section on tensor cores).
MMA_SYNC_ON_HOPPER = 0.63


@dataclass(frozen=True)
class Part:
    """A loop of a block, or what it runs once: `demand` per step, `steps` steps."""

    demand: Demand
    steps: int


@dataclass(frozen=True)
class Work:
    """One launch.

    Args:
        blocks: of the grid.
        resident: blocks that fit on a multiprocessor.
        warps: of a block.
        parts: of a block, in order; those of more than one step wait for loads.
        in_flight: steps whose loads are under way while one computes.
        memory_bytes: read from and written to device memory, by all blocks together.
        l2_bytes: between L2 and the multiprocessors.
        tensor_share: share of the tensor cores' rate that the instructions can reach.
        stalls: whether a step's parts wait for each other, as in loops that are not
            warp-specialized; False for the vendor's, whose rate was measured with what it waits.
        turns: trips to device memory of a block that nothing in it overlaps.
    """

    blocks: int
    resident: int
    warps: int
    parts: tuple[Part, ...]
    in_flight: int
    memory_bytes: float
    l2_bytes: float
    tensor_share: float = 1.0
    stalls: bool = True
    turns: int = 2


@dataclass(frozen=True)
class Limits:
    """Seconds of one or more launches."""

    memory: float = 0.0
    l2: float = 0.0
    tensor: float = 0.0
    issue: float = 0.0
    shared: float = 0.0
    waves: float = 0.0
    latency: float = 0.0
    launch: float = 0.0

    @property
    def floor(self) -> float:
        """The longest of the throughput limits."""
        return max(getattr(self, name) for name in THROUGHPUT)

    @property
    def bound(self) -> str:
        """What contributes most."""
        shares = {name: getattr(self, name) for name in ("waves", "latency", "launch")}
        shares[max(THROUGHPUT, key=lambda name: getattr(self, name))] = self.floor
        return max(shares, key=shares.get)

    @property
    def total(self) -> float:
        """The predicted time."""
        return self.floor + self.waves + self.latency + self.launch


THROUGHPUT = ("memory", "l2", "tensor", "issue", "shared")
LIMITS = tuple(field.name for field in fields(Limits))


def limits(work: Work, gpu: Gpu) -> Limits:
    """The time of each limit for a launch on a GPU, at its `rates`."""
    clock, rates = gpu.clock_under_load, gpu.rates
    totals = [0.0, 0.0, 0.0]
    for part in work.parts:
        for i, seconds in enumerate(_seconds(part.demand, work, gpu)):
            totals[i] += part.steps * seconds * work.blocks / gpu.multiprocessors
    memory, l2 = work.memory_bytes / rates.bandwidth, work.l2_bytes / rates.l2
    floor = max(memory, l2, *totals)

    # Rounds of as many blocks as fit; without waiting (`busy`) and with it.
    resident = min(work.resident, math.ceil(work.blocks / gpu.multiprocessors))
    most = resident * gpu.multiprocessors
    rounds, rest = divmod(work.blocks, most)
    busy = waiting = 0.0
    for count, blocks in [(rounds, most)] * (rounds > 0) + [(1, rest)] * (rest > 0):
        together = math.ceil(blocks / gpu.multiprocessors)
        moved = max(memory, l2) * blocks / work.blocks
        computed = stalled = 0.0
        for part in work.parts:
            step = together * max(_seconds(part.demand, work, gpu))
            computed += part.steps * step
            if part.steps > 1:
                stall = rates.stall / clock / together if work.stalls else 0.0
                step = max(step + stall, rates.latency / work.in_flight)
            stalled += part.steps * step
        busy += count * max(moved, computed)
        waiting += count * max(moved, stalled)
    # The ends of a block are covered by others of its multiprocessor, except in the first round.
    in_turn = math.ceil(work.blocks / most)
    chain = sum(part.demand.slots for part in work.parts if part.steps == 1) / work.warps
    alone = work.turns * rates.latency + chain * DEPENDENT_ISSUE / clock
    exposed = alone * (1 + (in_turn - 1) / resident)
    return Limits(
        *(memory, l2, *totals),
        waves=max(0.0, busy - floor),
        latency=waiting - busy + exposed,
        launch=rates.launch,
    )


def _seconds(demand: Demand, work: Work, gpu: Gpu) -> tuple[float, float, float]:
    """Of one block on an idle multiprocessor: tensor cores, issue, shared memory."""
    clock = gpu.clock_under_load
    return (
        demand.flops / (gpu.flops_per_clock * work.tensor_share * clock),
        demand.slots / (ISSUE_SLOTS * clock),
        demand.bytes / (SHARED_BYTES * clock),
    )


def total(parts: list[Limits]) -> Limits:
    """The sum of launches that run one after another, limit by limit.

    Each launch has a floor of its own: what these add up to beyond the longest sum counts as waves.
    """
    sums = {name: sum(getattr(part, name) for part in parts) for name in LIMITS}
    longest = max(sums[name] for name in THROUGHPUT)
    sums["waves"] += sum(part.floor for part in parts) - longest
    return Limits(**sums)


__all__ = ["LIMITS", "THROUGHPUT", "Limits", "Part", "Work", "limits", "total"]
