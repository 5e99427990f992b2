"""What the sign kernels take of each architecture, from ahead-of-time compilation."""

import json

import pytest

from tests.aot.process import run_compiling

KERNELS = ("sign_accumulate", "sign_gradient", "pack_signs", "sign_matmul")


def check_resources(*options: str) -> None:
    """No spills, within the shared memory of a block, and loads of 16 bytes kept in flight."""
    reports = json.loads(run_compiling("bench.kernel_resources.report", "--json", *options))
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
