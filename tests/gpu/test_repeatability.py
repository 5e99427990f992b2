"""Same inputs, same bits, a hundred times; no host synchronization."""

import pytest
import torch

from lorasb_kernels.functional import pack_signs, sign_accumulate_, sign_gradient, sign_matmul
from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers
from tests.ops.operands import same_bits

RUNS = 100


@pytest.mark.parametrize("M", [96, 2048], ids=["split", "whole"])
def test_forward_and_backward(M, backend, device):
    workload = Workload([[Layer("linear", 1024, 768)]], M, 96, torch.bfloat16, device)
    run = Run(lambda group: adapted_layers(group, backend), workload)
    first = (*run.forward(0), *run.both(0))
    for _ in range(RUNS):
        again = (*run.forward(0), *run.both(0))
        assert all(map(same_bits, first, again))


def test_signs(backend, device):
    generator = torch.Generator(device).manual_seed(0)
    dy, x = (
        torch.randn(1000, features, generator=generator, device=device).bfloat16()
        for features in (300, 500)
    )
    Z = torch.randn(500, 40, generator=generator, device=device)

    def everything():
        acc = torch.zeros(300, 500, device=device)
        sign_accumulate_(acc, dy, x, backend=backend)
        planes = pack_signs(acc, backend=backend)
        product = sign_matmul(*planes, Z, 500, backend=backend)
        return acc, product, *planes, *sign_gradient(dy, x, backend=backend)

    first = everything()
    for _ in range(RUNS):
        assert all(map(torch.equal, first, everything()))


def test_no_host_synchronization(backend, device):
    workload = Workload([[Layer("linear", 512, 512)]], 64, 32, torch.bfloat16, device)
    run = Run(lambda group: adapted_layers(group, backend), workload)
    run.both(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.both(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
