"""Time and memory of LoRA-SB's initialization on SmolLM2-135M, each in a fresh process.

    python -m bench.init_cost --output-dir bench/results

Writes init_cost.json (every measurement), init_cost.png (peak memory and time against the
number of blocks) and prints a table. All on one CPU thread. The contenders take turns, so that
a host whose speed drifts affects all of them; times are medians, peaks the largest. See
`bench.init_process` for what is measured and `bench.contenders_init` for the contenders.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.contenders_init import CONTENDERS
from bench.environment import environment
from lorasb_kernels.utils.figures import Styles, new_figure, save_png
from lorasb_kernels.utils.files import write_text

CURVE = ("plain, targets only", "resident", "layerwise")


def in_turns(contenders: Iterable[str], layers: int, samples: int, turns: int) -> list[dict]:
    """One result per contender, over `turns` fresh processes each."""
    results = []
    for turn in range(turns):
        results.append([run(contender, layers, samples) for contender in contenders])
        print(f"{layers} blocks, turn {turn + 1} of {turns}", file=sys.stderr)
    return [summary(runs) for runs in zip(*results, strict=True)]


def summary(runs: Sequence[dict]) -> dict:
    """One contender's measurements: the median time and the largest peak."""
    seconds = [result["seconds"] for result in runs]
    peaks = [result["peak_bytes"] for result in runs]
    return runs[0] | {
        "seconds": statistics.median(seconds),
        "seconds_of_each_run": seconds,
        "peak_bytes": max(peaks),
        "peak_bytes_of_each_run": peaks,
    }


def run(contender: str, layers: int, samples: int) -> dict:
    """The measurement of one fresh process."""
    command = [sys.executable, "-m", "bench.init_process", contender]
    command += ["--layers", str(layers), "--samples", str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: list[dict]) -> str:
    """The contenders on the whole model, relative to plain passes with the same loss."""
    plain = next(r for r in results if r["contender"] == "plain")
    targets = next(r for r in results if r["contender"] == "plain, targets only")
    lines = [
        f"{'contender':<20} {'seconds':>8} {'over plain':>11} {'over targets only':>18} "
        f"{'peak MB':>8} {'captured':>9}"
    ]
    for result in results:
        energy = result["captured_energy"]
        lines.append(
            f"{result['contender']:<20} {result['seconds']:>8.2f} "
            f"{100 * (result['seconds'] / plain['seconds'] - 1):>+10.1f}% "
            f"{100 * (result['seconds'] / targets['seconds'] - 1):>+17.1f}% "
            f"{result['peak_bytes'] / 1e6:>8.0f} "
            f"{'' if energy is None else f'{energy:.5f}':>9}"
        )
    first = results[0]
    needed = first["block_accumulators_bytes"] + first["boundaries_bytes"]
    lines.append(
        f"{first['samples']} samples, {first['tokens']} tokens in micro-batches of "
        f"{first['micro_batch']}; accumulators {first['all_accumulators_bytes'] / 1e6:.0f} MB, "
        f"of one block {first['block_accumulators_bytes'] / 1e6:.1f} MB, block boundaries "
        f"{first['boundaries_bytes'] / 1e6:.1f} MB (the last two: {needed / 1e6:.1f} MB)"
    )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Draws peak memory and time against the number of blocks."""
    figure, (memory, seconds) = new_figure(2, (9, 3.8))
    styles = Styles()
    for contender in CURVE:
        points = sorted((r["layers"], r) for r in results if r["contender"] == contender)
        layers = [count for count, _ in points]
        peak = [result["peak_bytes"] / 1e6 for _, result in points]
        style = styles.line(contender)
        memory.plot(layers, peak, marker="o", label=contender, **style)
        if contender == "layerwise":
            inside = [(r["peak_bytes"] - r["boundaries_bytes"]) / 1e6 for _, r in points]
            label = "layerwise without block boundaries"
            memory.plot(layers, inside, color=style["color"], linestyle=":", label=label)
        seconds.plot(layers, [result["seconds"] for _, result in points], marker="o", **style)
    memory.set(xlabel="blocks", ylabel="peak beyond the model, MB", ylim=0)
    seconds.set(xlabel="blocks", ylabel="CPU seconds, one thread", ylim=0)
    memory.legend(fontsize=7)
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("bench/results"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="*", default=[5, 10, 20])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    whole = in_turns(CONTENDERS, 30, arguments.samples, arguments.turns)
    curve = [r for r in whole if r["contender"] in CURVE]
    for layers in arguments.blocks:
        curve += in_turns(CURVE, layers, arguments.samples, arguments.turns)
    record = {
        "environment": asdict(environment(torch.device("cpu"))),
        "whole model": whole,
        "by number of blocks": curve,
    }
    write_text(arguments.output_dir / "init_cost.json", json.dumps(record, indent=1) + "\n")
    plot(curve, arguments.output_dir / "init_cost.png")
    print(table(whole))


if __name__ == "__main__":
    main()
