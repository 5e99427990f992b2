"""Runs a module in a process of its own: this one may have the interpreter's kernels."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_compiling(module: str, *arguments: str) -> str:
    """What `python -m module ...` prints where Triton compiles kernels; it must succeed."""
    completed = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


__all__ = ["run_compiling"]
