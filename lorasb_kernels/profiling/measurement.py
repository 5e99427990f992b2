"""Measures the adapted layers of a model on this machine."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lorasb_kernels.profiling.prediction import Kind, memory_table
from lorasb_kernels.profiling.roofline import measure_ceilings
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers, frozen_layer
from lorasb_kernels.utils.files import replacing
from lorasb_kernels.utils.tables import markdown_table, seconds, size
from lorasb_kernels.utils.timing import interleave, median, peak_bytes


def measure(
    kinds: Sequence[Kind],
    M: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backend: str = "auto",
    trace: str | Path | None = None,
    rounds: int = 15,
) -> str:
    """Markdown tables of measured times, shares of the roofline and memory, layer by layer.

    Args:
        kinds: the layers; each shape is measured once, alone, on random operands.
        M: tokens.
        r: rank.
        dtype: of weights and activations.
        device: where.
        backend: of the adapted layers.
        trace: file for a Chrome trace of one forward and backward of each shape, or None.
        rounds: repetitions.
    """
    ceilings = measure_ceilings(device, dtype, tiny=device.type == "cpu")
    rows, traced, total = [], {}, {"frozen": 0.0, "adapted": 0.0}
    for kind in kinds:
        layer = kind.layer
        workload = Workload([[layer]], M, r, dtype, device)
        runs = {
            "frozen": Run(lambda group: [frozen_layer(operands) for operands in group], workload),
            "adapted": Run(partial(adapted_layers, backend=backend), workload),
        }
        samples = interleave({name: run.both for name, run in runs.items()}, device, rounds=rounds)
        times = {name: median(values) for name, values in samples.items()}
        for name, value in times.items():
            total[name] += kind.count * value
        share = ceilings.floor(workload.launches("fused", "both")) / times["adapted"]
        peak = peak_bytes(runs["adapted"].both, device)
        rows.append(
            (
                layer.name,
                f"{layer.m}x{layer.n}",
                str(kind.count),
                *_cells(times),
                f"{share:.0%}",
                size(runs["adapted"].saved_bytes()),
                "" if peak is None else size(peak),
            )
        )
        if trace is not None:
            traced[f"{layer.name} {layer.m}x{layer.n}"] = runs["adapted"]
    rows.append(("all", "", str(sum(k.count for k in kinds)), *_cells(total), "", "", ""))
    if trace is not None:
        write_trace(traced, device, trace)
    header = ("layer", "shape", "count", "frozen", "adapted", "overhead")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return "\n\n".join(
        [
            f"Measured on {where}: forward and backward at {M} tokens, r = {r}, "
            f"{str(dtype).removeprefix('torch.')}; ceilings measured: "
            f"{ceilings.bandwidth / 1e9:.4g} GB/s, {ceilings.rate / 1e12:.3g} TFLOP/s.",
            markdown_table((*header, "of roofline", "kept for backward", "peak"), rows),
            memory_table(kinds, M, r, dtype),
        ]
    )


def _cells(times: dict[str, float]) -> tuple[str, str, str]:
    overhead = times["adapted"] / times["frozen"] - 1
    return seconds(times["frozen"]), seconds(times["adapted"]), f"{overhead:+.1%}"


def write_trace(runs: dict[str, Run], device: torch.device, path: str | Path) -> None:
    """Writes a Chrome trace (`chrome://tracing`, Perfetto) of one pass through each run."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for name, run in runs.items():
            with record_function(name):
                run.both(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with replacing(path) as building:
        profiler.export_chrome_trace(str(building))


__all__ = ["measure", "write_trace"]
