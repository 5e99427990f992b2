"""Compiled kernels that are kept are those that Triton would launch; with a stub of its driver."""

from tests.aot.process import run_compiling


def test_launches_take_the_kernels_that_triton_would():
    assert "launches" in run_compiling("tests.aot.launch_checks")
