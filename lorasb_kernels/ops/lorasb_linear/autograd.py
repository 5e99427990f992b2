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

from lorasb_kernels.ops.dispatch import PLAIN_TENSORS, is_observed
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer, dense
from lorasb_kernels.ops.lorasb_linear.operands import as_rows
from lorasb_kernels.ops.lorasb_linear.operations import Operations, operations


def forward(
    x, lora_A, lora_R, lora_B, weight, bias, scaling, dropout, seed, run: Operations, projected=None
):
    """y [..., m], no view of another tensor, h and p; arguments as for `LoRASBFunction`."""
    rows, dtype = as_rows(x), x.dtype
    if projected is None:
        if lora_A.dtype != dtype:
            lora_A = lora_A.to(dtype)
        projected = run.shrink(rows, lora_A, lora_R, scaling, dropout, seed)
    h, p = projected
    if lora_B.dtype != dtype:
        lora_B = lora_B.to(dtype)
    if isinstance(weight, FrozenLayer):
        y = weight.multiply(rows).to(dtype).addmm_(p, lora_B.t())
    else:
        y = run.expand(rows, weight, p, lora_B, bias)
    if x.dim() != 2:  # autograd would forbid writing to a view in place
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))
    return y, h, p


class LoRASBFunction(torch.autograd.Function):
    """One layer on x [..., n]; returns y [..., m].

    `weight` may be a `FrozenLayer`, and `lora_R` None. `direct` is as for `operations`. The last
    three arguments are for siblings: `projected` is (h, p); the gradient of `token` is dy, and
    `link` takes the rest of what dx needs.
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
        direct,
        projected=None,
        token=None,
        link=None,
    ):
        run = operations(backend, direct)
        operands = (x, lora_A, lora_R, lora_B, weight, bias, scaling, dropout, seed)
        y, h, p = forward(*operands, run, projected)
        _, trains_A, trains_R, trains_B = ctx.needs_input_grad[:4]
        frozen = isinstance(weight, FrozenLayer)
        ctx.save_for_backward(
            x.detach() if trains_A else None,  # the tensor itself may get other data
            h if trains_R else None,
            p if trains_B else None,
            lora_A,
            lora_R,
            lora_B,
            None if frozen else weight,
            seed,
        )
        frozen_layer = weight if frozen else None
        ctx.settings = (scaling, dropout, run, backend, direct, frozen_layer, link)
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # seldom: for most passes the wrapper is only a cost
            return _refuse_twice(ctx, dy)
        x, h, p, lora_A, lora_R, lora_B, weight, seed = ctx.saved_tensors
        trains_x, trains_A, trains_R, trains_B = ctx.needs_input_grad[:4]
        scaling, dropout, run, backend, direct, frozen_layer, link = ctx.settings
        if direct and (is_observed() or type(dy) not in PLAIN_TENSORS):
            run = operations(backend, False)
        rows, dtype = as_rows(dy), dy.dtype
        if lora_A.dtype != dtype:
            lora_A = lora_A.to(dtype)
        if lora_B.dtype != dtype:
            lora_B = lora_B.to(dtype)
        linked = link is not None and link.needed()
        q = dx = dA = dR = dB = dtoken = None
        if trains_R:
            q, dR = run.core_backward(rows, h, lora_B, lora_R, scaling)
        elif trains_x or trains_A or linked:
            q = run.core_input_gradient(rows, lora_B, lora_R, scaling)
        if trains_A:
            dA = run.gradient_of_A(q, as_rows(x), dropout, seed)
        if trains_B:
            dB = run.gradient_of_B(p, rows)
        if trains_x:
            frozen = weight if frozen_layer is None else dense(frozen_layer, dtype)
            dx = run.input_gradient(rows, frozen, q, lora_A, dropout, seed)
            if dy.dim() != 2:
                dx = dx.view(*dy.shape[:-1], dx.shape[1])
        if linked:
            link.leave(q, frozen_layer or weight, lora_A)
            dtoken = rows
        return dx, dA, dR, dB, None, None, None, None, None, None, None, None, dtoken, None


@torch.autograd.function.once_differentiable
def _refuse_twice(ctx, dy):
    """The same without gradients, with an error when the gradients are differentiated."""
    return LoRASBFunction.backward(ctx, dy)


# What `LoRASBFunction.apply` comes to where functorch is not active: it looks through all
# arguments for tensors of a transform that has ended.
apply_directly = super(torch.autograd.Function, LoRASBFunction).apply


__all__ = ["LoRASBFunction", "apply_directly", "forward"]
