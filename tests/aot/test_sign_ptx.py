"""The sign kernels' PTX for sm_86, executed on the CPU; their resources on every architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot.emulator import ptxcheck_folder

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("sign_accumulate", "sign_gradient", "pack_signs", "sign_matmul")


def run(*arguments: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.skipif(
    ptxcheck_folder() is None, reason="ptxcheck is not here; PTXCHECK_PATH names its folder"
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_emulated(kernel):
    run("tests.aot.sign_ptx_checks", kernel)


def check_resources(*options: str) -> None:
    """No spills, within the shared memory of a block, and loads of 16 bytes kept in flight."""
    reports = json.loads(run("bench.kernel_resources.report", "--json", *options))
    assert reports
    limits = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}
    for report in reports:
        assert report["stack"] == 0, report
        assert report["shared"] <= limits[report["arch"]] * 1024, report
        if report["kernel"] == "pack_signs":
            continue
        assert report["tensor_core"] in ("mma", "wgmma"), report
        assert report["copies_of_16_bytes"] > 0, report
        if report["case"] == "plain":
            assert report["narrower_copies"] == 0, report


def test_resources_of_the_common_variants_on_an_a6000():
    cases = "plain|accumulator|q=160.*"
    check_resources("--arch", "sm_86", "--dtype", "bfloat16", "float32", "--case", cases)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_resources_of_every_variant(arch):
    check_resources("--arch", arch, "--kernel", *KERNELS)
