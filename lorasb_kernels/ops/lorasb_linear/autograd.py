"""Adapted linear layers on one input, and their gradients, composed of three operations.

For layers i = 1 … G of equal rank, with Ā = [A₁; …; A_G] stacked and R̄ = diag(R₁, …, R_G):

    forward    h̄, p̄   = shrink(x, Ā, R̄)                  one pass over x instead of G
               yᵢ      = expand(x, Wᵢ, pᵢ, Bᵢ, biasᵢ)
    backward   qᵢ, dRᵢ = core_backward(dyᵢ, hᵢ, Bᵢ, Rᵢ)
               dx      = expand(dy₁, W₁ᵀ, q̄, Āᵀ), then dx += dyᵢ Wᵢ in place

Only h̄ (M·G·r elements) is kept for backward; no gradient needs x. The input gradients of the
layers meet in one accumulation chain: nothing of the size of x is written to be added later.
"""

import torch

from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.shrink import shrink


class LoRASBFunction(torch.autograd.Function):
    """`apply(x, stacked_A, scaling, dropout_p, seed, backend, *Rs, *Ws, *Bs, *biases)`.

    x is [M, n] with a contiguous last dimension. Returns a tuple of G outputs [M, mᵢ].
    """

    @staticmethod
    def forward(ctx, x, stacked_A, scaling, dropout_p, seed, backend, *operands):
        count = len(operands) // 4
        cores, weights, lora_Bs, biases = _runs(operands, count, 4)
        core = cores[0] if count == 1 else torch.block_diag(*cores)
        h, p = shrink(x, stacked_A, core, scaling, dropout_p, seed, backend)
        ys = tuple(
            expand(x, weight, p_i, lora_B, bias, 0.0, None, backend)
            for weight, p_i, lora_B, bias in zip(
                weights, p.split(cores[0].shape[0], dim=1), lora_Bs, biases, strict=True
            )
        )
        ctx.save_for_backward(h, stacked_A, seed, *cores, *weights, *lora_Bs)
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.count = scaling, dropout_p, backend, count
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        h, stacked_A, seed, *operands = ctx.saved_tensors
        cores, weights, lora_Bs = _runs(operands, ctx.count, 3)
        dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
        qs, dRs = [], []
        for dy, h_i, lora_B, core in zip(
            dys, h.split(cores[0].shape[0], dim=1), lora_Bs, cores, strict=True
        ):
            q, dR = core_backward(dy, h_i.contiguous(), lora_B, core, ctx.scaling, ctx.backend)
            qs.append(q)
            dRs.append(dR)
        dx = None
        if ctx.needs_input_grad[0]:
            q = qs[0] if ctx.count == 1 else torch.cat(qs, dim=1)
            dx = expand(
                dys[0], weights[0].T, q, stacked_A.T, None, ctx.dropout_p, seed, ctx.backend
            )
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
        first_core = 6
        for i in range(ctx.count):
            if not ctx.needs_input_grad[first_core + i]:
                dRs[i] = None
        return (dx, *[None] * (first_core - 1), *dRs, *[None] * (3 * ctx.count))


def _runs(operands, count: int, parts: int):
    return (operands[i * count : (i + 1) * count] for i in range(parts))


__all__ = ["LoRASBFunction"]
