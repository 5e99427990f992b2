"""The PTX compiled for sm_86, in bf16, executed on the CPU: values, races, bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.emulator import ptxcheck_folder

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    "shrink",
    "split_shrink",
    "shrink_mask",
    "shrink_strides",
    "core_backward",
    "factor_gradient",
    pytest.param("factor_gradient_strides", marks=pytest.mark.slow),
    "expand",
    "expand_descriptor",
    "single_precision",
    "bytes",
]


@pytest.mark.skipif(
    ptxcheck_folder() is None, reason="ptxcheck is not here; PTXCHECK_PATH names its folder"
)
@pytest.mark.parametrize("check", CHECKS)
def test_emulated(check):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    completed = subprocess.run(
        [sys.executable, "-m", "tests.aot.ptx_checks", check],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
