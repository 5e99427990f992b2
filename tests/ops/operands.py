"""Operands of the operator tests, their oracle, and the comparison of bits."""

import math

import numpy as np
import torch

from tests import formulas
from tests.contract import assert_within_contract, relative_error
from tests.ops.conftest import ON_GPU

# M, n (or m, or K), r: odd and round sizes, no row and one row, every kind of rank tile.
SHAPES = [
    (0, 40, 8),
    (1, 33, 1),
    (1, 256, 16),
    (7, 20, 3),
    (16, 64, 8),
    (33, 130, 24),
    (50, 71, 25),
    (64, 128, 32),
    (21, 96, 64),
    (40, 192, 96),
    (19, 150, 128),
    (10, 257, 200),
]
if ON_GPU:
    SHAPES += [
        (1, 4096, 96),
        (129, 1000, 48),
        (512, 4096, 96),
        (2049, 1111, 20),
        (4096, 4096, 256),
        (1000, 2048, 512),
    ]

SUMS = ("factor_gradient", "sign_accumulate")  # fp32 whatever the dtype of the operands

SEED = 0x1234_5678_9ABC_DEF1


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normal numbers of unit variance, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 7919 * math.prod(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def dropout_seed(device: torch.device) -> torch.Tensor:
    return torch.tensor([SEED], dtype=torch.int64, device=device)


def far_memory(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in which operands are placed far apart; on the CPU untouched pages cost nothing."""
    if device.type != "cpu":
        return torch.zeros(elements, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(elements * dtype.itemsize, dtype=np.uint8)).view(dtype)


def eager(operation: str, *arguments) -> tuple[torch.Tensor, ...]:
    """The operation's formula in eager PyTorch, in the dtype and on the device of the operands."""
    first = arguments[0]
    stored = torch.float32 if operation in SUMS else first.dtype
    return formulas.eager(getattr(formulas, operation), stored, first.device, *arguments)


def oracle(operation: str, *arguments) -> tuple[torch.Tensor, ...]:
    """The operation's formula in float64 on the CPU, from the same rounded operands."""
    return formulas.exact(getattr(formulas, operation), *arguments)


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def check(function, backend: str, *arguments) -> tuple[torch.Tensor, ...]:
    """Runs an operation; asserts the numerical contract, dtypes and the same bits twice."""
    operation = function.__name__
    outputs = as_tuple(function(*arguments, backend))
    yardstick = eager(operation, *arguments)
    exact = oracle(operation, *arguments)
    for index, (out, own, ref) in enumerate(zip(outputs, yardstick, exact, strict=True)):
        assert out.dtype == own.dtype
        if arguments[0].dtype == torch.float32:
            magnitudes = formulas.magnitudes(getattr(formulas, operation), *arguments)
            assert_single_precision(out, ref, magnitudes[index], longest(arguments))
        else:
            assert_within_contract(out, own, ref, name=f"{operation}[{index}]")
    again = as_tuple(function(*arguments, backend))
    assert all(map(same_bits, outputs, again)), f"{operation}: different bits on the second run"
    return outputs


def assert_single_precision(
    out: torch.Tensor, ref: torch.Tensor, magnitude: torch.Tensor, n: int
) -> None:
    """The contract of fp32 operands, which eager fp32 on another device is no measure of.

    With eps = 2⁻²³, u = eps/2 and S = Σ|terms| of an element, the sum over n products errs by

    * up to 6·eps·S where a product is three of tf32: either operand is cut to 22 bits and the
      product of the low parts is left out, 2⁻²² each;
    * up to 24·eps·S where tensor cores add: they cut the sum after every 4 products instead of
      rounding it, 3·32/4 times within the 32 terms that a step sums from zero;
    * about √n·eps·S from adding the steps in fp32: n roundings of at most u·S whose signs are
      independent (Higham and Mary 2019, SIAM J. Sci. Comput. 41, λ = 2).

    2·eps more for the scaling and the last rounding: |out − ref| ≤ (32 + √n)·eps·S, for each
    element. Partial sums of random signs are about S/√n, not S: the norm of the error is held
    to a quarter of that relative to the result's, ‖out − ref‖ ≤ (8 + √n/4)·eps·‖ref‖.

    Args:
        out: fp32.
        ref: float64.
        magnitude: S, the formula in float64 on the absolute values of the operands.
        n: length of the longest sum.
    """
    assert out.shape == ref.shape
    if ref.numel() == 0:
        return
    eps = torch.finfo(torch.float32).eps
    limit = (32 + math.sqrt(n)) * eps
    excess = ((out.cpu().double() - ref).abs() - limit * magnitude).max().item()
    assert excess <= 0, f"an element is off by {excess:.3e} more than {limit:.3e} of its terms"
    limit = (8 + math.sqrt(n) / 4) * eps
    error = relative_error(out, ref)
    assert error <= limit, f"relative error {error:.3e} > {limit:.3e}"


def longest(arguments) -> int:
    """No sum of an operation is longer than the largest size of its operands."""
    return max(size for a in arguments if isinstance(a, torch.Tensor) for size in a.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of representations: NaN equals itself, 0 is not −0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))
