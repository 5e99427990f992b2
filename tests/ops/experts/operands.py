"""Operands of the experts' tests, and the formula, segment by segment."""

import math

import torch

from tests.ops.operands import normal

CPU = torch.device("cpu")

# Tokens of each expert: mixed with empty ones, one expert, all tokens in one, none at all, and
# rows that belong to no expert (the last number).
SEGMENTS = {
    "mixed": ([3, 0, 11, 1, 0, 18], 0),
    "one expert": ([9], 0),
    "all in one": ([0, 0, 23, 0], 0),
    "no tokens": ([0, 0, 0], 0),
    "rows of no expert": ([4, 0, 7], 5),
}


def operands(
    tokens,
    tail=0,
    *,
    n=24,
    m=16,
    r=4,
    dtype=torch.float64,
    device=CPU,
    bias=False,
    shared=False,
    is_transposed=False,
) -> dict:
    """The tensors of `experts_linear` by name; x and R require grad."""
    E, M = len(tokens), sum(tokens) + tail
    given = {"dtype": dtype, "device": device}
    core = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    factors = 1 if shared else E
    weight = normal(E, m, n, seed=1, **given) / math.sqrt(n)
    offsets = torch.tensor(tokens).cumsum(0).to(device, torch.int32)
    return {
        "x": normal(M, n, **given).requires_grad_(),
        "weight": weight.mT.contiguous() if is_transposed else weight,
        "A": normal(factors, r, n, seed=2, **given) / math.sqrt(n),
        "R": normal(E, r, r, seed=3, **core).requires_grad_(),
        "B": normal(factors, m, r, seed=4, **given),
        "offsets": offsets,
        "bias": normal(E, m, seed=5, **given) if bias else None,
        "is_transposed": is_transposed,
    }


def formula(x, weight, A, R, B, offsets, bias, is_transposed, scaling, dropped=None):
    """y, literally; `dropped` is the adapter's input after dropout, x without."""
    dropped = x if dropped is None else dropped
    weight = weight.mT if is_transposed else weight
    E, ends = weight.shape[0], [0, *offsets.tolist()]
    A, B = A.expand(E, -1, -1), B.expand(E, -1, -1)
    parts = []
    for e in range(E):
        rows = slice(ends[e], ends[e + 1])
        h = dropped[rows] @ A[e].T
        y = x[rows] @ weight[e].T + scaling * ((h @ R[e].T.to(h.dtype)) @ B[e].T)
        parts.append(y if bias is None else y + bias[e])
    tail = x[ends[-1] :].detach()
    return torch.cat([*parts, tail.new_zeros(tail.shape[0], weight.shape[1])])


def widened(arguments: dict) -> dict:
    """The same operands in float64 on the CPU, as leaves of their own."""
    return {
        name: value.detach().cpu().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def leaves(arguments: dict) -> dict:
    """The same operands, as leaves of their own."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
