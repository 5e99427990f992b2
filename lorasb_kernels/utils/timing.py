"""Timing, the same for everything: medians of interleaved bursts over rotated operands.

A burst is several calls in a row, so that a GPU's queue is as full as in training: the launches of
one call overlap the work of the previous one, and if launches are the limit, that is visible. CUDA
events time it on a GPU, the wall clock on a CPU. Contenders take turns burst by burst, so a
drifting clock affects all of them. Each call takes an index by which it rotates through copies of
its operands that together exceed the L2 cache.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[int], object]

BURST_SECONDS = 2e-3
MAX_COPIES = 16


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 20,
    burst_seconds: float = BURST_SECONDS,
) -> dict[str, list[float]]:
    """Times several calls against each other.

    Args:
        calls: `call(i)` by name; `i` counts up, for rotating operands.
        device: where they run.
        rounds: bursts of each call.
        burst_seconds: least length of a burst, as estimated from a first call.

    Returns:
        Seconds per call by name, one number per burst.
    """
    lengths = {}
    for name, call in calls.items():
        for i in range(2):  # compiles, allocates
            call(i)
        trial = _burst(call, 0, 2, device)()
        lengths[name] = max(1, min(1000, round(burst_seconds / max(trial, 1e-7))))
    samples = {name: [] for name in calls}
    index = 0
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        pending = []
        for name in names[first:] + names[:first]:
            pending.append((name, _burst(calls[name], index, lengths[name], device)))
            index += lengths[name]
        for name, seconds in pending:
            samples[name].append(seconds())
    return samples


def _burst(call: Call, start: int, length: int, device: torch.device) -> Callable[[], float]:
    """Runs a burst; returns a function that waits for it and returns seconds per call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for i in range(start, start + length):
            call(i)
        seconds = (time.perf_counter() - begin) / length
        return lambda: seconds
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for i in range(start, start + length):
            call(i)
        after.record()

    def seconds() -> float:
        after.synchronize()
        return before.elapsed_time(after) * 1e-3 / length

    return seconds


def copies_past_cache(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of operands of this size it takes to fill the L2 cache twice."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, -(-2 * cache // max(bytes_of_one, 1))))


def captured(call: Call, copies: int, device: torch.device) -> Call:
    """`call` as CUDA graphs, one for each copy of the operands, replayed in turn.

    The results of a replay are in memory that the next replay overwrites.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(2 * copies):
            call(i)
    torch.cuda.current_stream(device).wait_stream(stream)
    graphs, pool = [], None
    for i in range(copies):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call(i)
        pool = graph.pool()
        graphs.append(graph)
    return lambda i: graphs[i % copies].replay()


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak device memory of one call beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def median(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 10 %, 50 % and 90 % quantiles as `p10`, `p50`, `p90`."""
    if len(samples) == 1:
        return dict.fromkeys(("p10", "p50", "p90"), samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p10": cuts[0], "p50": median(samples), "p90": cuts[-1]}


__all__ = ["captured", "copies_past_cache", "interleave", "median", "peak_bytes", "quantiles"]
