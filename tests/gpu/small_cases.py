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

SHAPES = ((33, 70, 50, 24), (5, 33, 129, 3), (130, 64, 96, 96))  # M, n, m, r


def layer(M: int, n: int, m: int, r: int, backend: str, device: torch.device, dropout: float):
    """Output, input gradient and gradient of R; the same draw for every backend."""
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype)

    x = normal(M, n).requires_grad_()
    R = normal(r, r, dtype=torch.float32).requires_grad_()
    y = lorasb_linear(
        *(x, normal(m, n), normal(r, n), R, normal(m, r), normal(m)),
        dropout=dropout,
        backend=backend,
    )
    return y.detach(), *torch.autograd.grad(y, (x, R), normal(M, m))


def signs(M: int, n: int, m: int, backend: str, device: torch.device):
    """Accumulated and one-shot planes, and both products with them."""
    torch.manual_seed(0)
    dy, x = (torch.randn(M, columns).to(device, torch.bfloat16) for columns in (m, n))
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
    for backend in BACKENDS:
        reason = obstacle(backend, device, torch.bfloat16)
        if reason is not None:
            print(f"{backend}: not run, {reason}")
            continue
        for M, n, m, r in SHAPES:
            expected = layer(M, n, m, r, "reference", torch.device("cpu"), 0.0)
            close(layer(M, n, m, r, backend, device, 0.0), expected, 3e-2)
            assert all(t.isfinite().all() for t in layer(M, n, m, r, backend, device, 0.3))
            expected = signs(M, n, m, "reference", torch.device("cpu"))
            found = signs(M, n, m, backend, device)
            close(found[:1], expected[:1], 1e-2)
            assert all(tensor.isfinite().all() for tensor in found)
        print(f"{backend}: {len(SHAPES)} shapes")


if __name__ == "__main__":
    main()
