"""AdamW for LoRA factors, each preconditioned by the other; LoRA-One's optimizer.

    ĝ_A = (BᵀB + λI)⁻¹ g_A          AdamW step of A from ĝ_A
    ĝ_B = g_B (AAᵀ + λI)⁻¹          AdamW step of B from ĝ_B, with the A just updated

(arXiv:2502.01235, algorithm 1; the preconditioners are those of arXiv:2402.02347.) Moments are
those of the preconditioned gradients. A step along ĝ changes B·A by the same amount, however the
scale is split between A and B.

    optimizer = PreconditionedAdamW(*split_parameters(model), lr=1e-3)

All pairs of one rank are inverted in one batched Cholesky factorization, all products of layers
of one shape are one batched product, and moments and parameters are updated by torch's
multi-tensor kernels. Nothing waits for the device.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lorasb_kernels.targets import adapted_layers

Pair = tuple[torch.Tensor, torch.Tensor]


def split_parameters(model: nn.Module) -> tuple[list[Pair], list[nn.Parameter]]:
    """The (A, B) pairs of an adapted model, and everything else in it that is trained.

    Raises:
        ValueError: the model has no layer that trains A and B.
    """
    layers = [layer for layer in adapted_layers(model).values() if layer.lora_R is None]
    if not layers:
        raise ValueError("the model has no LoRALinear; expected an init that trains A and B")
    pairs = [(layer.lora_A, layer.lora_B) for layer in layers]
    paired = {id(factor) for pair in pairs for factor in pair}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
    return pairs, others


class PreconditionedAdamW(torch.optim.Optimizer):
    """AdamW over (A, B) pairs, each factor preconditioned by its partner; plain over the rest.

    A pair whose Gram matrix G cannot be factored in fp32 (A or B nearly rank deficient and λ small)
    gets 2(r + √k)·ε·tr(G) added to its λ, with k the length of the Gram products and ε fp32's
    rounding error: a bound on the rounding of G and of its factorization. This happens on the
    device, without a host sync; `damped_steps` says how often. If A or B is not finite, the result
    is not finite either.

    Args:
        pairs: (A [r, n], B [m, r]) of each layer; any ranks and shapes.
        others: parameters without a partner (heads), for plain AdamW.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, `p −= lr·weight_decay·p`.
        damping: λ.
        bias_correction: divide the moments by 1 − βᵗ, as Adam does. The published LoRA-One code
            does not.

    Raises:
        ValueError: no pairs, shapes that make no pair, or a setting outside its range.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        others: Iterable[torch.Tensor] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        bias_correction: bool = True,
    ):
        pairs, others = list(pairs), list(others)
        if not pairs:
            raise ValueError("pairs is empty; expected at least one (A, B)")
        for index, (A, B) in enumerate(pairs):
            if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(
                    f"pairs[{index}] has shapes {tuple(A.shape)} and {tuple(B.shape)}; "
                    "expected A [r, n] and B [m, r]"
                )
        bounds = {"lr": (lr, 0), "eps": (eps, 0), "weight_decay": (weight_decay, 0)}
        for name, (value, least) in (bounds | {"damping": (damping, 0)}).items():
            if not least <= value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a finite number >= {least}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}; expected two numbers in [0, 1)")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "bias_correction": bias_correction,
            "step": 0,
        }
        groups = [{"params": [factor for pair in pairs for factor in pair], "paired": True}]
        if others:
            groups.append({"params": others, "paired": False})
        super().__init__(groups, defaults)
        self._damped = torch.zeros((), dtype=torch.int64, device=pairs[0][0].device)

    @property
    def damped_steps(self) -> int:
        """How often, over all pairs and steps, a Gram matrix got more than λ. Waits for the
        device."""
        return int(self._damped)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step; a pair or parameter without gradients is left unchanged.

        Raises:
            ValueError: only one factor of a pair has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            if not group["paired"]:
                parameters = [p for p in group["params"] if p.grad is not None]
                self._adamw(group, parameters, gradients_of(parameters))
                continue
            As, Bs = _with_gradients(group["params"][::2], group["params"][1::2])
            if As:
                self._step_pairs(group, As, Bs)
        return loss

    def _step_pairs(self, group: dict, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> None:
        left = self._inverse_grams([B.mT for B in Bs], group["damping"])
        self._adamw(group, As, _products(left, gradients_of(As)))
        right = self._inverse_grams(As, group["damping"])
        gradients = _products(right, [gradient.mT for gradient in gradients_of(Bs)])
        self._adamw(group, Bs, [gradient.mT.contiguous() for gradient in gradients])

    def _inverse_grams(self, factors: Sequence[torch.Tensor], damping: float) -> list[torch.Tensor]:
        """(F Fᵀ + λI)⁻¹ of each F [r, k]."""
        grams = _products(factors, [factor.mT for factor in factors])
        inverses: list[torch.Tensor] = [grams[0]] * len(grams)
        for positions in _same_shapes(grams):
            gram = torch.stack([grams[i] for i in positions])
            length = max(factors[i].shape[1] for i in positions)
            inverse = self._inverse(gram, damping, length)
            for position, matrix in zip(positions, inverse.unbind(), strict=True):
                inverses[position] = matrix
        return inverses

    def _inverse(self, gram: torch.Tensor, damping: float, length: int) -> torch.Tensor:
        """(G + λI)⁻¹ = L⁻ᵀL⁻¹ of a batch of Gram matrices [L, r, r] of products of `length`."""
        r = gram.shape[-1]
        identity = torch.eye(r, dtype=gram.dtype, device=gram.device)
        damped = gram + damping * identity
        _, info = torch.linalg.cholesky_ex(damped)
        failed = info != 0
        self._damped += failed.sum()
        rounding = 2 * (r + length**0.5) * torch.finfo(gram.dtype).eps
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        more = torch.where(failed, rounding * trace, 0)
        factor, info = torch.linalg.cholesky_ex(damped + more[:, None, None] * identity)
        # Non-finite entries come from a non-finite G; a failed factorization may still look finite.
        factor = torch.where((info != 0)[:, None, None], torch.nan, factor)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(gram), upper=False)
        return inverse.mT @ inverse

    def _adamw(self, group: dict, parameters: list, gradients: list) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        means = [self.state[p]["exp_avg"] for p in parameters]
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, correction2**0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, roots, value=-lr / correction1)


def gradients_of(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _with_gradients(As: Sequence, Bs: Sequence) -> tuple[list, list]:
    kept = []
    for A, B in zip(As, Bs, strict=True):
        if (A.grad is None) != (B.grad is None):
            lacking = "A" if A.grad is None else "B"
            raise ValueError(
                f"{lacking} of a pair with shapes {tuple(A.shape)} and {tuple(B.shape)} has no "
                "gradient and its partner has one; expected gradients of both"
            )
        if A.grad is not None:
            kept.append((A, B))
    return [A for A, _ in kept], [B for _, B in kept]


def _products(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`left[i] @ right[i]`, one batched product per shape."""
    products: list[torch.Tensor] = [left[0]] * len(left)
    for positions in _same_shapes(right):
        stacked = (torch.stack([side[i] for i in positions]) for side in (left, right))
        for position, product in zip(positions, torch.bmm(*stacked).unbind(), strict=True):
            products[position] = product
    return products


def _same_shapes(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    positions = defaultdict(list)
    for index, tensor in enumerate(tensors):
        positions[tensor.shape].append(index)
    return list(positions.values())


__all__ = ["PreconditionedAdamW", "split_parameters"]
