"""Runs every operation of every backend once on small odd shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.gpu.small_cases

Checks results coarsely, so that a launch that fails silently is detected; the tests check accuracy.
"""

import argparse

import torch

from lorasb_kernels.functional import (
    lorasb_linear,
    pack_signs,
    sign_accumulate_,
    sign_gradient,
    sign_matmul,
)
from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.ops.limits import BACKENDS
from tests import formulas

SHAPES = ((33, 70, 50, 24), (5, 33, 129, 3), (130, 64, 96, 96))  # M, n, m, r


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16):
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype)


def layer_operands(M: int, n: int, m: int, r: int, device: torch.device):
    """x, W, A, R, B, bias and dy of an adapted layer."""
    shapes = (M, n), (m, n), (r, n), (r, r), (m, r), (m,), (M, m)
    operands = [normal(*shape, device=device) for shape in shapes]
    operands[3] = operands[3].float()
    return operands


def layer(x, weight, lora_A, lora_R, lora_B, bias, dy, dropout: float, backend: str):
    """Output, input gradient and gradient of R."""
    x.requires_grad_()
    lora_R.requires_grad_()
    factors = lora_A, lora_R, lora_B
    y = lorasb_linear(x, weight, *factors, bias, dropout=dropout, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, lora_R), dy)


def signs(dy, x, backend: str):
    """The accumulated gradient, and both products with its signs."""
    (m, n), device = (dy.shape[1], x.shape[1]), x.device
    acc = torch.zeros(m, n, device=device)
    sign_accumulate_(acc, dy, x, backend=backend)
    planes = pack_signs(acc, backend=backend)
    sign_gradient(dy, x, backend=backend)
    Z, Y = torch.randn(n, 20).to(device), torch.randn(m, 20).to(device)
    product = sign_matmul(*planes, Z, n, backend=backend)
    transposed = sign_matmul(*planes, Y, n, True, backend=backend)
    return acc, product, transposed


def close(found, expected, tolerance: float) -> None:
    """Raises AssertionError if tensors differ by more than `tolerance` in norm."""
    for out, ref in zip(found, expected, strict=True):
        error = (out.double().cpu() - ref.double().cpu()).norm() / ref.double().norm().cpu()
        assert error <= tolerance, f"relative error {error:.1e}; expected at most {tolerance:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    for backend in BACKENDS:
        reason = obstacle(backend, device, torch.bfloat16)
        if reason is not None:
            print(f"{backend}: not run, {reason}")
            continue
        for M, n, m, r in SHAPES:
            operands = layer_operands(M, n, m, r, device)
            expected = formulas.exact(formulas.lorasb_linear, *operands, 1.0)
            close(layer(*operands, 0.0, backend), expected, 3e-2)
            assert all(t.isfinite().all() for t in layer(*operands, 0.3, backend))
            dy, x = normal(M, m, device=device), normal(M, n, device=device)
            found = signs(dy, x, backend)
            close(found[:1], (dy.double().cpu().T @ x.double().cpu(),), 1e-2)
            assert all(tensor.isfinite().all() for tensor in found)
        print(f"{backend}: {len(SHAPES)} shapes")


if __name__ == "__main__":
    main()
