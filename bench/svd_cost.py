"""`truncated_svd` compared with `torch.svd_lowrank` on the CPU: time and captured energy.

    python -m bench.svd_cost --output-dir bench/results

Over the signs of SmolLM2-135M's gradients, every fifth block, and over random signs, whose flat
spectrum is the hard case. `svd_lowrank(q=r, niter=10)` is the published procedure's; its `niter`
is then doubled until it captures `ACCURACY` of the best rank-r energy, which is its time at equal
accuracy. Time is the processor time of one thread, the least of several turns; the time of
`truncated_svd` includes unpacking the signs.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from bench.environment import environment
from bench.init_process import headline_batches, load
from lorasb_kernels import SignMatrix
from lorasb_kernels.init import estimate_updates, truncated_svd
from lorasb_kernels.targets import find_targets
from lorasb_kernels.utils.files import write_text

ACCURACY = 0.9999
ITERATIONS = (10, 20, 40, 80, 160, 320)
SHAPES = ((576, 576), (1024, 1024), (2048, 2048))


def gradient_signs(every: int) -> list[SignMatrix]:
    """The signs of every `every`-th block's gradients, as the initialization estimates them."""
    model = load(30, torch.float32)
    chosen = {str(block) for block in range(0, 30, every)}
    targets = [name for name in find_targets(model, "all-linear") if name.split(".")[2] in chosen]
    return [signs for _, signs in estimate_updates(model, headline_batches(32, 4), targets)]


def random_signs(shape: tuple[int, int]) -> SignMatrix:
    """±1, each with probability a half."""
    generator = torch.Generator().manual_seed(0)
    return SignMatrix.from_dense(torch.randn(shape, generator=generator))


def best_energy(dense: torch.Tensor) -> torch.Tensor:
    """Energy of the best approximation of every rank, in float64: [min(m, n)]."""
    dense = dense.double() if dense.shape[0] <= dense.shape[1] else dense.double().T
    return torch.linalg.eigvalsh(dense @ dense.T).flip(0).cumsum(0)


def captured(dense: torch.Tensor, V: torch.Tensor, best: torch.Tensor) -> float:
    """‖ΔW V‖² over the best rank's, for orthonormal V [n, r]."""
    basis = torch.linalg.qr(V.double()).Q
    return float((dense.double() @ basis).square().sum() / best)


def least_seconds(function: Callable[[], object], turns: int) -> float:
    """Processor time of the fastest turn."""
    seconds = []
    for _ in range(turns):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(signs: SignMatrix, dense: torch.Tensor, best: torch.Tensor, r: int, turns: int) -> dict:
    """Both decompositions of one matrix, and `svd_lowrank` at equal accuracy."""
    torch.manual_seed(0)
    iterations = {}
    for niter in ITERATIONS:
        iterations[niter] = captured(dense, torch.svd_lowrank(dense, q=r, niter=niter)[2], best)
        if iterations[niter] >= ACCURACY:
            break
    ours = truncated_svd(signs, r)
    return {
        "m": dense.shape[0],
        "n": dense.shape[1],
        "r": r,
        "captured": captured(dense, ours.V, best),
        "svd_lowrank captured": iterations[10],
        "svd_lowrank niter at equal accuracy": niter if iterations[niter] >= ACCURACY else None,
        "seconds": least_seconds(lambda: truncated_svd(signs, r), turns),
        "svd_lowrank seconds": least_seconds(
            lambda: torch.svd_lowrank(dense, q=r, niter=10), turns
        ),
        "svd_lowrank seconds at equal accuracy": least_seconds(
            lambda: torch.svd_lowrank(dense, q=r, niter=niter), turns
        ),
    }


def table(results: list[dict]) -> str:
    """Milliseconds per matrix by kind, shape and rank; the least captured energy."""
    groups = defaultdict(list)
    for row in results:
        groups[row["kind"], f"{row['m']} × {row['n']}", row["r"]].append(row)
    lines = [
        "| signs | matrix | r | `svd_lowrank`, niter = 10 | captured | to capture 0.9999 | niter "
        "| ours | captured |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (kind, shape, r), rows in groups.items():
        milliseconds = [
            f"{1e3 * sum(row[key] for row in rows) / len(rows):.1f}"
            for key in ("svd_lowrank seconds", "svd_lowrank seconds at equal accuracy", "seconds")
        ]
        needed = [row["svd_lowrank niter at equal accuracy"] for row in rows]
        missed = None in needed
        if missed:
            niter = f"> {ITERATIONS[-1]}"
        else:
            niter = "–".join(map(str, sorted({min(needed), max(needed)})))
        lines.append(
            f"| {kind} | {shape} | {r} | {milliseconds[0]} "
            f"| {min(row['svd_lowrank captured'] for row in rows):.5f} "
            f"| {'> ' if missed else ''}{milliseconds[1]} | {niter} "
            f"| {milliseconds[2]} | {min(row['captured'] for row in rows):.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("bench/results"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 96])
    parser.add_argument("--every", type=int, default=5, help="blocks of the model; default 5")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    matrices = [("gradient", signs) for signs in gradient_signs(arguments.every)]
    matrices += [("random", random_signs(shape)) for shape in SHAPES]
    results = []
    for i, (kind, signs) in enumerate(matrices):
        dense = signs.to_dense()
        energies = best_energy(dense)
        for r in arguments.ranks:
            best = float(energies[r - 1])
            row = {"kind": kind} | measure(signs, dense, best, r, arguments.turns)
            results.append(row)
        print(f"{i + 1} of {len(matrices)} matrices", file=sys.stderr)
    record = {"environment": asdict(environment(torch.device("cpu"))), "matrices": results}
    write_text(arguments.output_dir / "svd_cost.json", json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
