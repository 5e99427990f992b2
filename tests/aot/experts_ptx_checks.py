"""The checks of the experts' kernels on emulated PTX; run by `run_checks.py`."""

import torch

from lorasb_kernels.ops.experts import reference
from lorasb_kernels.ops.triton import experts
from tests.aot.emulator import emulated
from tests.contract import assert_within_contract
from tests.ops.experts.operands import operands
from tests.ops.operands import as_tuple, dropout_seed, normal, same_bits

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SCALING = 0.75


def exact(operation: str, *arguments) -> tuple[torch.Tensor, ...]:
    """The reference in float64, which the formula is the oracle of in tests/ops/experts."""
    widened = (
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )
    return as_tuple(getattr(reference, operation)(*widened))


def compare(arch: str, operation: str, *arguments, rows: int, **options) -> tuple:
    """Runs an operation in the emulator; rows from `rows` on belong to no expert."""
    with emulated(arch, **options) as log:
        outputs = as_tuple(getattr(experts, operation)(*arguments))
    eager = as_tuple(getattr(reference, operation)(*arguments))
    M = arguments[0].shape[0]
    for out, own, ref in zip(outputs, eager, exact(operation, *arguments), strict=True):
        assert out.dtype == own.dtype
        if operation != "experts_expand" and out.shape[0] == M:
            out, own, ref = out[:rows], own[:rows], ref[:rows]
        assert_within_contract(out, own, ref, name=operation)
    return outputs, log


def experts_of(tokens, tail, n, m, r, **settings):
    given = operands(tokens, tail, n=n, m=m, r=r, dtype=BF16, bias=True, **settings)
    return {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }


def check_experts(arch):
    """Three operations in one launch each (two for the backward of the core); dropout; strides."""
    tokens, tail = [5, 0, 70, 1], 3
    rows = sum(tokens)
    for n, m, r, dropout, shared in ((72, 40, 24, 0.0, False), (37, 50, 3, 0.3, True)):
        given = experts_of(tokens, tail, n, m, r, shared=shared)
        x, weight, A, R, B, offsets, bias, _ = given.values()
        seed = dropout_seed(CPU) if dropout else None
        drop = (dropout, seed)
        (_, p), log = compare(arch, "experts_shrink", x, A, R, offsets, SCALING, *drop, rows=rows)
        assert len(log) == 1
        p[rows:] = 0
        _, log = compare(
            arch, "experts_expand", x, weight, p, B, bias, offsets, 0.0, None, rows=rows
        )
        assert len(log) == 1
        dy = normal(rows + tail, m, dtype=BF16, device=CPU, seed=7)
        h = normal(rows + tail, r, dtype=BF16, device=CPU, seed=8)
        (q, _), log = compare(
            arch, "experts_core_backward", dy, h, B, R, offsets, SCALING, rows=rows
        )
        assert len(log) == 2
        q[rows:] = 0
        compare(arch, "experts_expand", dy, weight.mT, q, A.mT, None, offsets, *drop, rows=rows)


def check_experts_order(arch):
    """The last block of an expert's dR finishes it: the same bits under any order of blocks."""
    tokens, r = [3, 1200, 0, 520], 16
    M = sum(tokens)
    offsets = torch.tensor(tokens).cumsum(0).int()
    g, h = (normal(M, r, dtype=BF16, device=CPU, seed=seed) for seed in (1, 2))
    outputs = []
    for options in ({}, {"schedule_seed": 1}, {"schedule_seed": 2}, {"cp_async": "early"}):
        with emulated(arch, **options) as log:
            outputs.append(experts.core_backward.experts_rank_gradient(g, h, offsets, SCALING))
        assert sum(stats.atomic_ops for stats in log) == 3 + 2, "one per block of two experts"
    parts = zip(g.double().split(tokens), h.double().split(tokens), strict=True)
    expected = SCALING * torch.stack([left.T @ right for left, right in parts])
    torch.testing.assert_close(outputs[0].double(), expected, rtol=1e-4, atol=1e-3)
    assert all(same_bits(outputs[0], other) for other in outputs[1:])
