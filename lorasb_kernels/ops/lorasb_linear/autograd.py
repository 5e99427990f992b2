"""An adapted linear layer and its gradients, composed of four operations.

    forward    h, p  = shrink(x, A, R)
               y     = expand(x, W, p, B, bias)
    backward   q, dR = core_backward(dy, h, B, R)
               dx    = expand(dy, Wᵀ, q, Aᵀ)
               dA    = factor_gradient(q, x)
               dBᵀ   = factor_gradient(p, dy)

Frozen factors have no gradients, and what only those would need is neither computed nor kept: h is
saved if R trains, p if B trains (M·r elements each), x (M·n) if A trains. If R does not train, q
comes from the first half of core_backward, which is a shrink: q = s · (dy B) R.

A and B may be fp32 while x has 16 bits. They are rounded to the dtype of x here, inside, so that
their gradients are returned in fp32, as they were accumulated. Backward rounds again instead of
keeping the rounded factors: this reads r·(m + n) elements, against M·(m + n) of the gradients.

A layer that shares its input with others (`siblings.py`) has the same node, which saves the same
tensors. It is given h and p, and leaves dx to the node of the common input.
"""

import torch

from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.factor_gradient import factor_gradient
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer, adapted_product, dense
from lorasb_kernels.ops.shrink import shrink


class LoRASBFunction(torch.autograd.Function):
    """One layer on x [M, n] with a contiguous last dimension; returns y [M, m].

    `weight` may be a `FrozenLayer`. The last three arguments are for siblings: `projected` is
    (h, p); the gradient of `token` is dy, and `link` takes the rest of what dx needs.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        lora_A,
        lora_R,
        lora_B,
        weight,
        bias,
        scaling,
        dropout,
        seed,
        backend,
        projected=None,
        token=None,
        link=None,
    ):
        if projected is None:
            projected = shrink(x, lora_A.to(x.dtype), lora_R, scaling, dropout, seed, backend)
        h, p = projected
        y = adapted_product(x, weight, p, lora_B.to(x.dtype), bias, backend)
        _, trains_A, trains_R, trains_B = ctx.needs_input_grad[:4]
        frozen = isinstance(weight, FrozenLayer)
        ctx.save_for_backward(
            x if trains_A else None,
            h if trains_R else None,
            p if trains_B else None,
            lora_A,
            lora_R,
            lora_B,
            None if frozen else weight,
            seed,
        )
        ctx.frozen = weight if frozen else None
        ctx.scaling, ctx.dropout, ctx.backend, ctx.link = scaling, dropout, backend, link
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, h, p, lora_A, lora_R, lora_B, weight, seed = ctx.saved_tensors
        trains_x, trains_A, trains_R, trains_B = ctx.needs_input_grad[:4]
        scaling, dropout, backend = ctx.scaling, ctx.dropout, ctx.backend
        weight = ctx.frozen or weight
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        linked = ctx.link is not None and ctx.link.needed()
        q = dx = dA = dR = dB = dtoken = None
        if trains_R:
            q, dR = core_backward(dy, h, lora_B.to(dy.dtype), lora_R, scaling, backend)
        elif trains_x or trains_A or linked:
            _, q = shrink(dy, lora_B.to(dy.dtype).T, lora_R.T, scaling, 0.0, None, backend)
        if trains_A:
            dA = factor_gradient(q, x, dropout, seed, backend)
        if trains_B:
            dB = factor_gradient(p, dy, 0.0, None, backend).T
        if trains_x:
            frozen, factor = dense(weight, dy.dtype).T, lora_A.to(dy.dtype).T
            dx = expand(dy, frozen, q, factor, None, dropout, seed, backend)
        if linked:
            ctx.link.leave(q, weight, lora_A)
            dtoken = dy
        return (dx, dA, dR, dB, *(None,) * 7, dtoken, None)


__all__ = ["LoRASBFunction"]
