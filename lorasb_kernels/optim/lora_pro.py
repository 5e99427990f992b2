"""AdamW for LoRA factors whose steps follow full fine-tuning's: LoRA-Pro (arXiv:2407.18242).

A step of A and B moves the weight W + s·B·A along the equivalent gradient

    g̃ = s·(g_B A + B g_A)          [m, n]

Of all g_A, g_B, these bring g̃ nearest to the gradient of W (theorem 2.1), for any X [r, r]:

    g_A = (BᵀB)⁻¹ ∂A / s² + X A
    g_B = (I − B (BᵀB)⁻¹ Bᵀ) ∂B (AAᵀ)⁻¹ / s² − B X

with ∂A, ∂B the gradients that autograd gives. X is the one that moves g_A, g_B least from ∂A, ∂B
(theorem 2.3), the solution of the Sylvester equation

    BᵀB X + X AAᵀ = −(BᵀB)⁻¹ ∂A Aᵀ / s²

AdamW's moments are those of g̃ (algorithm 2): 8·m·n bytes per layer in fp32, as much as full
fine-tuning keeps. It is here to compare with, not to save memory.
"""

from collections.abc import Iterable

import torch

from lorasb_kernels.optim.preconditioned import Pair, PreconditionedAdamW, gradients_of


def closest_gradients(
    A: torch.Tensor,
    B: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    scaling: float,
    damping: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """g_A [r, n] and g_B [m, r], whose equivalent gradient is nearest to the gradient of W.

    Args:
        A, B: the factors, [r, n] and [m, r].
        grad_A, grad_B: their gradients, s·Bᵀg and s·gAᵀ for the gradient g of W.
        scaling: s.
        damping: λ added to the diagonals of BᵀB and AAᵀ; a new B is 0.
    """
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    gram_A, gram_B = A @ A.mT + damping * identity, B.mT @ B + damping * identity
    whitened_A = torch.linalg.solve(gram_B, grad_A) / scaling**2  # (BᵀB)⁻¹ ∂A / s²
    whitened_B = torch.linalg.solve(gram_A, grad_B, left=False) / scaling**2  # ∂B (AAᵀ)⁻¹ / s²
    outside_B = whitened_B - B @ torch.linalg.solve(gram_B, B.mT @ whitened_B)
    X = solve_sylvester(gram_B, gram_A, -whitened_A @ A.mT)
    return whitened_A + X @ A, outside_B - B @ X


def solve_sylvester(P: torch.Tensor, Q: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """X with P X + X Q = C, for symmetric positive definite P and Q [r, r]."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    return U @ ((U.mT @ C @ V) / (p[:, None] + q[None, :])) @ V.mT


class LoRAProAdamW(PreconditionedAdamW):
    """AdamW over (A, B) pairs along the gradient of the weight; plain AdamW over the rest.

    Args:
        pairs, others: as for `PreconditionedAdamW`.
        scaling: s of the adapters.
        options: further keyword arguments of `PreconditionedAdamW`, `lr` to `bias_correction`.

    Raises:
        ValueError: as `PreconditionedAdamW`; a scaling that is not finite and positive.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        others: Iterable[torch.Tensor] = (),
        *,
        scaling: float,
        **options,
    ):
        if not 0 < scaling < float("inf"):
            raise ValueError(f"scaling is {scaling}; expected a finite number > 0")
        super().__init__(pairs, others, **options)
        self.scaling = scaling

    def _step_pairs(self, group: dict, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> None:
        s, damping = self.scaling, group["damping"]
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        correction1 = 1 - beta1**step if group["bias_correction"] else 1.0
        correction2 = 1 - beta2**step if group["bias_correction"] else 1.0
        gradients = zip(gradients_of(As), gradients_of(Bs), strict=True)
        for A, B, (plain_A, plain_B) in zip(As, Bs, gradients, strict=True):
            g_A, g_B = closest_gradients(A, B, plain_A, plain_B, s, damping)
            equivalent = s * (g_B @ A + B @ g_A)
            state = self.state[A]
            if not state:
                state["exp_avg"] = torch.zeros_like(equivalent)
                state["exp_avg_sq"] = torch.zeros_like(equivalent)
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.lerp_(equivalent, 1 - beta1)
            square.mul_(beta2).addcmul_(equivalent, equivalent, value=1 - beta2)
            root = (square / correction2).sqrt_().add_(group["eps"])
            direction = (mean / correction1).div_(root)
            g_A, g_B = closest_gradients(
                A, B, s * B.mT @ direction, s * direction @ A.mT, s, damping
            )
            for factor, gradient in ((A, g_A), (B, g_B)):
                factor.mul_(1 - lr * group["weight_decay"]).sub_(gradient, alpha=lr)


__all__ = ["LoRAProAdamW", "closest_gradients", "solve_sylvester"]
