"""Every contender computes what its description says, so that its time is meaningful."""

import pytest
import torch
import torch.nn.functional as F

from bench.comparison import TimedRun
from bench.contenders import CONTENDERS
from lorasb_kernels.ops.triton import interpreting
from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.profiling.workload import Operands, Run, Workload
from tests.contract import assert_within_contract

M, R = 9, 4
GROUPS = [[Layer("q", 24, 20), Layer("k", 24, 12)], [Layer("o", 20, 24)]]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU


def formula(operands: Operands, x: torch.Tensor, trains: str, dtype: torch.dtype):
    """The output and the trained tensors, in plain PyTorch in `dtype`."""
    tensors = (operands.weight, operands.bias, operands.lora_A, operands.lora_R, operands.lora_B)
    W, bias, A, core, B = (tensor.detach().to(dtype) for tensor in tensors)
    y = F.linear(x, W, bias)
    if trains == "nothing":
        return y, []
    if trains == "core":
        core.requires_grad_()
        return y + operands.scaling * (x @ A.T @ core.T @ B.T), [core]
    A.requires_grad_()
    B.requires_grad_()
    return y + operands.scaling * (x @ A.T @ B.T), [A, B]


def expected(workload: Workload, trains: str, dtype: torch.dtype):
    """Outputs, input gradients and gradients of what is trained."""
    copy = workload.copies[0]
    inputs = [x.detach().to(dtype).requires_grad_() for x in copy.inputs]
    outputs, trained = [], []
    for x, group in zip(inputs, copy.groups, strict=True):
        for operands in group:
            y, parameters = formula(operands, x, trains, dtype)
            outputs.append(y)
            trained += parameters
    dys = [dy.to(dtype) for dy in copy.dys]
    return [*outputs, *torch.autograd.grad(outputs, [*inputs, *trained], dys)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * contender.compiles)
        for name, contender in CONTENDERS.items()
    ],
)
def test_contender_equals_its_formula(name, dtype):
    contender = CONTENDERS[name]
    reason = contender.obstacle(DEVICE, dtype)
    if reason:
        pytest.skip(reason)
    if "triton" in name and dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    workload = Workload(GROUPS, M, R, dtype, DEVICE, bias=True, scaling=0.5)
    run = TimedRun(contender.build, workload)
    found = [*run.forward(0), *run.both(0)]
    exact = expected(workload, contender.trains, torch.float64)
    eager = expected(workload, contender.trains, dtype)
    assert len(found) == len(exact)
    for index, (out, same, ref) in enumerate(zip(found, eager, exact, strict=True)):
        assert_within_contract(out, same, ref, name=f"{name}[{index}]")
    for out, again in zip(run.both(0), run.backward(0), strict=True):
        torch.testing.assert_close(out, again)


def kept(name: str, groups) -> int:
    workload = Workload(groups, M, R, torch.bfloat16, CPU)
    return Run(CONTENDERS[name].build, workload).saved_bytes()


def test_what_forward_keeps():
    one = [[Layer("linear", 24, 20)]]
    x, h = M * 24 * 2, M * R * 2
    assert kept("frozen", one) == 0
    assert kept("lorasb reference", one) == h
    assert kept("published", one) == h
    assert kept("peft", one) == x + h
    assert kept("lorasb reference", GROUPS) == 3 * h


def test_backends_are_all_there():
    for backend in ("reference", "triton", "cuda"):
        assert f"lorasb {backend}" in CONTENDERS
        assert f"lorasb {backend}, shared input" in CONTENDERS
