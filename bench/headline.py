"""The table that `make gpu` prints, and the file to send.

    python -m bench.headline bench/results                         # the newest results below it
    python -m bench.headline bench/results --smoke-tests red       # first notes how the tests went

Forward and backward of one Mistral-7B block, r = 96, as a multiple of the frozen block's time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.environment import environment
from bench.recording import file_of, write
from lorasb_kernels.profiling.results import Results, Row, read_all
from lorasb_kernels.utils.tables import markdown_table, seconds

# Operation and tokens by column; a dry run has fewer tokens.
COLUMNS = {
    "512 tokens, in a CUDA graph": ("block.graph", 512),
    "8192 tokens": ("block.both", 8192),
    "dry run": ("block.both", 16),
}
WORDS = {
    "frozen": "frozen block, no adapter",
    "addmm": "LoRA-SB in cuBLAS calls",
    "published": "LoRA-SB as published",
    "peft": "LoRA by peft",
    "lorasb triton": "LoRA-SB by this library",
    "lorasb triton, shared input": "the same, q k v and gate up together",
    "lorasb reference": "LoRA-SB by this library, plain PyTorch",
    "lorasb reference, shared input": "the same, q k v and gate up together",
}


def multiples(found: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds, and the multiple of the frozen block's, by column and contender."""
    table = {}
    for title, (op, tokens) in COLUMNS.items():
        rows = [
            row
            for row in found.select(op=op, tokens=tokens, quantity="time", quantile="p50")
            if row.shape in ("mistral-7b/block", "tiny/block") and row.r in (96, 8)
        ]
        bound = [row.value for row in rows if row.contender == "frozen"]
        if bound:
            table[title] = {row.contender: (1e-6 * row.value, row.value / bound[0]) for row in rows}
    return table


def headline_table(found: Results) -> str:
    """The table; empty if nothing of it has been measured."""
    columns = multiples(found)
    names = dict.fromkeys(name for timed in columns.values() for name in timed)
    rows = []
    for name in [name for name in WORDS if name in names]:
        cells = []
        for timed in columns.values():
            time, multiple = timed.get(name, (None, None))
            cells.append("" if time is None else f"{multiple:.2f}× ({seconds(time)})")
        rows.append((WORDS[name], *cells))
    return markdown_table(("forward and backward, r = 96", *columns), rows) if rows else ""


def smoke_tests_failed(found: Results) -> bool:
    """Whether the tests before the measurements failed."""
    return any(row.value == 0 for row in found.rows if row.op == "tests")


def summary(found: Results, path: Path) -> str:
    """What a person reads at the end of a run."""
    lines = [f"{found.environment.gpu}, Mistral-7B, one block, bf16; less is better"]
    if found.environment.gpu.startswith("cpu"):
        lines = ["A dry run on a CPU with tiny shapes: the numbers say nothing."]
    if smoke_tests_failed(found):
        lines.append("NOT VALID: a smoke test failed, so the numbers may be of wrong results.")
    if not any(row.op == "tests" for row in found.rows):
        lines.append("The smoke tests have not run to their end.")
    lines += [headline_table(found) or "Nothing of the table was measured."]
    return "\n".join([*lines, f"Send this file: {path}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of the newest results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", help="folder of results")
    parser.add_argument("--smoke-tests", choices=("green", "red"), help="note how they went")
    options = parser.parse_args(arguments)
    if options.smoke_tests:
        here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        passed = float(options.smoke_tests == "green")
        row = Row("tests", "", 0, 0, "", "smoke", "passed", "", passed, "1")
        write(options.results, here, [row])
    found = read_all(options.results)
    if not found:
        print("No results yet.")
    else:
        print(summary(found[-1], file_of(options.results, found[-1].environment)))


__all__ = ["headline_table", "multiples", "smoke_tests_failed", "summary"]

if __name__ == "__main__":
    main()
