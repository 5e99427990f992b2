"""Writes docs/numerics.md: the error of each operation, relative to the allowed error.

    python -m tests.trust.report [--cases 200] [--out docs/numerics.md]

Runs every operation, dtype and backend that this machine can run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.utils.files import write_text
from tests.trust.operators import OPERATORS, SINGLE

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "float16", "bfloat16")

TEXT = """\
# How exact the operations are

Written by `python -m tests.trust.report`; {machine}.

Each number is the worst that was seen of

    contract   err(out) / 2·(err(eager) + eps·|exact| + luck·terms)      whole tensor
    elements   err(out) / (2·err(eager) + 8·eps·terms)                   each element by itself

against float64 on the CPU, by maximum and by norm; 1 is the limit. `eager` is the same formula in
plain PyTorch in the same dtypes, `terms` the sum of the magnitudes that were added, `eps` that of
the dtype, `luck` 2⁻²³, or eps/2 for up to 16 elements (`tests/trust/judging.py`). Sizes, ranks
from 1 to 70, strides, scalings, dropout, leading dimensions, magnitudes from 1e-20 to 1e20 (fp16:
1e-7 to 1e4) and the places of NaN, infinities, denormals and zeros are drawn by hypothesis, which
is steered to where the ratio grows. A clean number where the exact result is NaN or infinite, NaN
where it is finite, an element that was not written, and other bits on a second run have no
tolerance: they fail.

On a GPU the contract is held with `allow_bf16_reduced_precision_reduction` and
`allow_fp16_reduced_precision_reduction` of `torch.backends.cuda.matmul` at `False`. Torch's
default, `True`, lets cuBLAS round the partial sums of a long contraction that it splits over blocks
(few rows, many columns). That holds for the frozen `nn.Linear` too, and the route `two_call`, made
of the same products, is as exact as that. The Triton and CUDA kernels add in fp32 under any
setting. Nothing here changes a setting of torch; `explain` says where this one has a say.

Signs have no rounding: for `sign_gradient` the number is how far from 0 the exact sum of a wrong
sign was, in roundings of its terms; `pack_signs` is exact. `lora` is `lorasb_linear` without a
core, its A and B trained in fp32. fp32 numbers above 3.4011e38, the largest in tf32, are not
drawn: the Triton kernels' three tf32 terms take them for infinite.

{table}

{backends}

The same cases run as tests, a few in `make test` and 200 or more each in `make test-full`.
"""
BACKENDS = {
    "reference": "`reference`: plain PyTorch.",
    "triton": "`triton`: the Triton kernels on the GPU.",
    "triton, interpreted": "`triton, interpreted`: the Triton kernels in Triton's interpreter, "
    "whose arithmetic is NumPy's. It multiplies bf16 wrongly, so bf16 is not run.",
    "triton, emulated": "`triton, emulated`: the PTX that they compile to for sm_86, executed on "
    "the CPU with the rounding of tensor cores; few cases, as it is slow.",
    "cuda": "`cuda`: the CUDA extension on the GPU.",
}


@dataclass(frozen=True)
class Run:
    """One way of running the operations here."""

    label: str
    backend: str
    dtypes: tuple[str, ...]
    share: float  # of the cases asked for
    options: tuple[str, ...] = ()


def runs() -> Iterator[Run]:
    """What this machine can run."""
    if torch.cuda.is_available():
        for backend in ("reference", "triton", "cuda"):
            if obstacle(backend, torch.device("cuda"), torch.bfloat16) is None:
                yield Run(backend, backend, DTYPES, 1, ("--device", "cuda"))
        return
    yield Run("reference", "reference", DTYPES, 1)
    yield Run("triton, interpreted", "triton", DTYPES[:2], 0.4)
    yield Run("triton, emulated", "triton", ("float32", "bfloat16"), 0.1, ("--emulated",))


def worst(run: Run, dtype: str, cases: int) -> Iterator[dict]:
    """The worst ratios of every operation, found in a separate process."""
    operators = [op for op in OPERATORS if dtype == "float32" or op not in SINGLE]
    count = max(1, round(cases * run.share))
    command = [sys.executable, "-m", "tests.trust.worst", dtype, run.backend, *operators]
    process = subprocess.Popen(
        [*command, "--cases", str(count), *run.options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        result = json.loads(line)
        print(dtype, run.label, result, flush=True)
        if result["fault"]:
            raise SystemExit(f"{result['operator']}, {dtype}, {run.label}: {result['fault']}")
        yield {**result, "dtype": dtype, "backend": run.label}
    if process.wait() != 0:
        raise SystemExit(f"{dtype}, {run.label}: exit status {process.returncode}")


def table(found: list[dict]) -> str:
    """Markdown, a row for each operation, dtype and backend."""
    head = "| operation | dtype | backend | cases | contract | elements |"
    lines = [head, "|---|---|---|--:|--:|--:|"]
    for result in sorted(found, key=lambda result: list(OPERATORS).index(result["operator"])):
        names = f"`{result['operator']}` | {result['dtype']} | {result['backend']}"
        numbers = f"{result['cases']} | {result['contract']:.2f} | {result['elements']:.2f}"
        lines.append(f"| {names} | {numbers} |")
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"torch {torch.__version__}, triton {triton.__version__}, {device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="for each of the table's rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "numerics.md")
    options = parser.parse_args()
    here = list(runs())
    found = [
        result
        for run in here
        for dtype in run.dtypes
        for result in worst(run, dtype, options.cases)
    ]
    notes = "\n".join(f"* {BACKENDS[run.label]}" for run in here)
    text = TEXT.format(machine=machine(), table=table(found), backends=notes)
    write_text(options.out, text)


if __name__ == "__main__":
    main()
