"""Operands of the operator tests, their oracle, and what counts as the same bits."""

import importlib
import math

import torch

from tests.contract import assert_within_contract, relative_error
from tests.ops.conftest import ON_GPU

# M, n (or m, or K), r: odd and round, no row and one row, every kind of rank tile.
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

# fp32 operands: three tf32 products keep 22 bits of each; ‖out − ref‖ / ‖ref‖.
SINGLE_TOLERANCE = 2e-6

SEED = 0x1234_5678_9ABC_DEF1


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normal numbers of unit variance, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 7919 * math.prod(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def dropout_seed(device: torch.device) -> torch.Tensor:
    return torch.tensor([SEED], dtype=torch.int64, device=device)


def reference(operation: str, *arguments):
    """The reference implementation in the arguments' own dtypes: eager PyTorch."""
    module = importlib.import_module(f"lorasb_kernels.ops.{operation}.reference")
    return as_tuple(getattr(module, operation)(*arguments))


def oracle(operation: str, *arguments):
    """The reference in float64 on the CPU, from the same rounded operands."""

    def widen(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        return argument.cpu().double() if argument.is_floating_point() else argument.cpu()

    return reference(operation, *map(widen, arguments))


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def check(function, backend: str, *arguments) -> tuple[torch.Tensor, ...]:
    """Runs an operation; asserts the numerical contract, dtypes and the same bits twice."""
    operation = function.__name__
    outputs = as_tuple(function(*arguments, backend))
    eager = reference(operation, *arguments)
    exact = oracle(operation, *arguments)
    for index, (out, own, ref) in enumerate(zip(outputs, eager, exact, strict=True)):
        assert out.dtype == own.dtype
        if arguments[0].dtype == torch.float32:
            assert out.shape == ref.shape
            assert ref.numel() == 0 or relative_error(out, ref) <= SINGLE_TOLERANCE
        else:
            assert_within_contract(out, own, ref, name=f"{operation}[{index}]")
    again = as_tuple(function(*arguments, backend))
    assert all(map(same_bits, outputs, again)), f"{operation}: different bits on the second run"
    return outputs


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of representations: NaN equals itself, 0 is not −0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))
