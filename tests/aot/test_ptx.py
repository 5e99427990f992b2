"""The PTX compiled for sm_86 and sm_90, executed on the CPU: values, races, bytes, faults.

The default run shares a process between the checks of an architecture.
"""

import re
from pathlib import Path

import pytest

from tests.aot.process import run_compiling

FOLDER = Path(__file__).parent
CHECKS = {
    name
    for path in FOLDER.glob("*_checks.py")
    for name in re.findall(r"^def check_(\w+)\(arch\)", path.read_text(), re.MULTILINE)
}
DEFAULT = {
    "sm_86": (
        *("shrink", "core_backward", "factor_gradient", "expand", "single_precision", "bytes"),
        *("sign_gradient", "pack_signs", "sign_matmul", "experts", "faults"),
    ),
    "sm_90": (
        *(
            "shrink_group",
            "split_shrink",
            "core_backward",
            "expand",
            "expand_descriptor",
            "sign_gradient",
        ),
        "faults",
    ),
}
SLOW = [(arch, check) for arch in DEFAULT for check in sorted(CHECKS - {*DEFAULT[arch]})]


def run_checks(arch: str, *checks: str) -> None:
    run_compiling("tests.aot.run_checks", arch, *checks)


@pytest.mark.parametrize("arch", DEFAULT)
def test_executed(arch):
    run_checks(arch, *DEFAULT[arch])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "check"), SLOW)
def test_executed_at_length(arch, check):
    run_checks(arch, check)
