"""The experts' kernels spill nothing, use the tensor cores and copy 16 bytes at a time."""

import pytest

from tests.aot.test_resources import assert_fits, reports

KERNELS = {"experts_projection", "experts_expand", "experts_gradient"}
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90")
DTYPES = ("bfloat16", "float16", "float32")
ALL = [
    pytest.param(arch, dtype, ".*", marks=pytest.mark.slow) for arch in DEVICES for dtype in DTYPES
]


@pytest.mark.parametrize(
    ("arch", "dtype", "case"), [("sm_86", "bfloat16", "r=96|dx, dropout|width=32"), *ALL]
)
def test_resources(arch, dtype, case):
    flags = ("--arch", arch, "--dtype", dtype, "--kernel", *sorted(KERNELS), "--case", case)
    found = reports(*flags)
    assert {report["kernel"] for report in found} == KERNELS
    for report in found:
        assert_fits(report)
