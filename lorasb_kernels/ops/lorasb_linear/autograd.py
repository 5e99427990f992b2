"""Adapted linear layers on one input and their gradients, composed of four operations.

For layers i = 1 … G of equal rank, with Ā = [A₁; …; A_G] stacked and R̄ = diag(R₁, …, R_G):

    forward    h̄, p̄   = shrink(x, Ā, R̄)                  one pass over x instead of G
               yᵢ      = expand(x, Wᵢ, pᵢ, Bᵢ, biasᵢ)
    backward   qᵢ, dRᵢ = core_backward(dyᵢ, hᵢ, Bᵢ, Rᵢ)
               dx      = expand(dy₁, W₁ᵀ, q̄, Āᵀ), then dx += dyᵢ Wᵢ in place
               dĀ      = factor_gradient(q̄, x)             one pass over x instead of G
               dBᵢᵀ    = factor_gradient(pᵢ, dyᵢ)

Frozen factors have no gradients, and what only those would need is neither computed nor kept: h̄
is saved if an R trains, p̄ if a B trains (M·G·r elements each), x (M·n) if an A trains. If no R
trains, q comes from the first half of core_backward, which is a shrink: q = s · (dy B) R. The input
gradients of the layers are accumulated in place: no second tensor of the size of x is written.

A and B may be fp32 while x has 16 bits. They are rounded to the dtype of x here, inside, so that
their gradients are returned in fp32, as they were accumulated. Backward rounds again instead of
keeping the rounded factors: this reads r·(m + n) elements, against M·(m + n) of the gradients.
"""

from typing import NamedTuple

import torch

from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.factor_gradient import factor_gradient
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer, adapted_product, dense
from lorasb_kernels.ops.shrink import shrink


class LoRASBFunction(torch.autograd.Function):
    """`apply(x, stacked_A, scaling, dropout, seed, backend, *Rs, *Ws, *Bs, *biases)`.

    x is [M, n] with a contiguous last dimension; a W may be a `FrozenLayer`. Returns a tuple of G
    outputs [M, mᵢ].
    """

    @staticmethod
    def forward(ctx, x, stacked_A, scaling, dropout, seed, backend, *operands):
        count = len(operands) // 4
        cores, weights, lora_Bs, biases = _runs(operands, count, 4)
        core = cores[0] if count == 1 else torch.block_diag(*cores)
        h, p = shrink(x, stacked_A.to(x.dtype), core, scaling, dropout, seed, backend)
        ys = tuple(
            adapted_product(x, weight, p_i, lora_B.to(x.dtype), bias, backend)
            for weight, p_i, lora_B, bias in zip(
                weights, p.split(cores[0].shape[0], dim=1), lora_Bs, biases, strict=True
            )
        )
        trained = _trained(ctx.needs_input_grad, count)
        ctx.save_for_backward(
            x if trained.A else None,
            h if any(trained.Rs) else None,
            p if any(trained.Bs) else None,
            stacked_A,
            seed,
            *cores,
            *(None if isinstance(weight, FrozenLayer) else weight for weight in weights),
            *lora_Bs,
        )
        ctx.frozen = [w if isinstance(w, FrozenLayer) else None for w in weights]
        ctx.scaling, ctx.dropout, ctx.backend, ctx.count = scaling, dropout, backend, count
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, h, p, stacked_A, seed, *operands = ctx.saved_tensors
        cores, weights, lora_Bs = _runs(operands, ctx.count, 3)
        weights = [layer or weight for layer, weight in zip(ctx.frozen, weights, strict=True)]
        trained = _trained(ctx.needs_input_grad, ctx.count)
        dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
        r = cores[0].shape[0]
        qs, dRs, dBs = [], [], []
        for i, (dy, lora_B, core) in enumerate(zip(dys, lora_Bs, cores, strict=True)):
            ranks = slice(i * r, (i + 1) * r)
            lora_B = lora_B.to(dy.dtype)
            q = dR = dB = None
            if trained.Rs[i]:
                h_i = h[:, ranks].contiguous()
                q, dR = core_backward(dy, h_i, lora_B, core, ctx.scaling, ctx.backend)
            elif trained.x or trained.A:
                _, q = shrink(dy, lora_B.T, core.T, ctx.scaling, 0.0, None, ctx.backend)
            if trained.Bs[i]:
                dB = factor_gradient(p[:, ranks], dy, 0.0, None, ctx.backend).T
            qs.append(q)
            dRs.append(dR)
            dBs.append(dB)
        dA = dx = None
        if trained.x or trained.A:
            q = qs[0] if ctx.count == 1 else torch.cat(qs, dim=1)
        if trained.A:
            dA = factor_gradient(q, x, ctx.dropout, seed, ctx.backend)
        if trained.x:
            factor = stacked_A.to(q.dtype).T
            weight = dense(weights[0], q.dtype)
            dx = expand(dys[0], weight.T, q, factor, None, ctx.dropout, seed, ctx.backend)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, dense(weight, dy.dtype))
        nothing = [None] * ctx.count
        return (dx, dA, None, None, None, None, *dRs, *nothing, *dBs, *nothing)


class _Trained(NamedTuple):
    """Which inputs of `LoRASBFunction` need a gradient."""

    x: bool
    A: bool
    Rs: tuple[bool, ...]
    Bs: tuple[bool, ...]


def _trained(needs_input_grad: tuple[bool, ...], count: int) -> _Trained:
    Rs, _, Bs, _ = _runs(needs_input_grad[6:], count, 4)
    return _Trained(needs_input_grad[0], needs_input_grad[1], Rs, Bs)


def _runs(operands, count: int, parts: int):
    return (operands[i * count : (i + 1) * count] for i in range(parts))


__all__ = ["LoRASBFunction"]
