"""The kernels that `lorasb profile` times are those it predicts; the report fits what they took."""

import dataclasses

import pytest
import torch

from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.profiling.model_check import check_model, kernel_calls
from lorasb_kernels.profiling.shapes import Layer

CPU = torch.device("cpu")
LAYER = Layer("linear", 64, 32)
PUBLISHED = GPUS["h100"]
TRUE = dataclasses.replace(
    PUBLISHED, rates=dataclasses.replace(PUBLISHED.rates, launch=3e-6, latency=0.8e-6)
)
M, R = 20, 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_the_routes_compute_the_same_on_the_copy_asked_for():
    torch.manual_seed(0)
    calls = {
        name: call for name, call, _ in kernel_calls(PUBLISHED, LAYER, M, R, torch.float16, CPU, 2)
    }
    assert [name.split()[0] for name in calls] == [
        *("GEMM", "two_call", "shrink", "dR", "fused", "fused_descriptor")
    ]
    for i in range(3):
        expected = calls["two_call"](i)
        assert expected.shape == (M, LAYER.m)
        for name, call in calls.items():
            if name.startswith("fused"):
                torch.testing.assert_close(call(i), expected, rtol=2e-2, atol=0.3)
    assert torch.equal(calls["GEMM"](0), calls["GEMM"](2))
    assert not torch.equal(calls["GEMM"](0), calls["GEMM"](1))
    assert calls["shrink"](0)[0].shape == (M, R)
    assert calls["dR"](0).shape == (R, R)


def test_the_report_fits_what_the_kernels_took():
    seen = []

    def timer(calls, copies, device):
        seen.append(len(calls))
        tokens = M if len(seen) == 1 else 2048
        predictions = kernel_calls(PUBLISHED, LAYER, tokens, R, torch.float16, CPU, 1)
        return {name: predict(TRUE) for name, _, predict in predictions}

    report = check_model(PUBLISHED, [LAYER], [M, 2048], R, torch.float16, CPU, timer)
    assert seen == [6, 6]
    assert "two_call 32×64 M 20" in report
    rows = [[cell.strip() for cell in line.split("|")] for line in report.splitlines()]
    fitted = {row[1]: float(row[3]) for row in rows if row[1:2] in (["launch"], ["latency"])}
    assert fitted == {
        "launch": pytest.approx(3e-6, rel=0.1),
        "latency": pytest.approx(0.8e-6, rel=0.1),
    }
