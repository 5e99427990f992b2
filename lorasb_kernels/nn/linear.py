"""The adapted layers: `LoRASBLinear` trains the core R, `LoRALinear` trains A and B."""

from typing import Any, ClassVar

import torch
from torch import nn

from lorasb_kernels.nn.adapted import AdaptedLinear


def inverse_grams(
    lora_A: torch.Tensor, lora_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(BᵀB)⁻¹ and (AAᵀ)⁻¹ [r, r] in fp32 or wider; None if both are the identity up to rounding.

    The inverse for full-rank factors; otherwise the pseudo-inverse, which gives the shortest of
    the optimal gradients.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    gram_A, gram_B = A @ A.T, B.T @ B
    identity = torch.eye(A.shape[0], device=A.device, dtype=dtype)
    rounding = max(torch.finfo(lora_A.dtype).eps, 1e-5)
    deviation = max((gram_A - identity).abs().max(), (gram_B - identity).abs().max())
    if deviation <= rounding:
        return None
    left, right = (
        torch.linalg.pinv(gram.double(), hermitian=True).to(dtype) for gram in (gram_B, gram_A)
    )
    return left, right


class _OptimalGradient(torch.autograd.Function):
    """See `with_optimal_gradient`."""

    @staticmethod
    def forward(ctx, lora_R, left, right, scaling):
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        return lora_R.view_as(lora_R)

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        if left is not None:
            gradient = left @ gradient @ right
        return gradient / ctx.scaling**2, None, None, None


def with_optimal_gradient(
    lora_R: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """R, whose gradient G becomes `left · G · right / s²`; None stands for the identity."""
    return _OptimalGradient.apply(lora_R, left, right, scaling)


torch.fx.wrap("with_optimal_gradient")


class LoRASBLinear(AdaptedLinear):
    """`y = x (W + s·B·R·A)ᵀ + bias` with W, bias, A, B frozen and R trained.

    `lora_A` [r, n] and `lora_B` [m, r] are buffers in the dtype of the weight; `lora_R`
    [r, r] is an fp32 parameter and stays fp32 under `half()`, `bfloat16()` and `to(dtype)`.
    A new layer has random orthonormal A and B and R = 0: it computes the frozen layer.

    Args:
        in_features: n.
        out_features: m.
        r: rank, at most min(m, n).
        optimal_gradient: replace the gradient of R by the optimal one,
            `(1/s²)·(BᵀB)⁻¹ g (AAᵀ)⁻¹` (arXiv:2411.19557, theorem 3). With orthonormal A, B
            and s = 1 that is the plain gradient, which is then used as it is. Adam is invariant
            to it where AAᵀ and BᵀB are diagonal; see `LoRASBConfig.orthonormalize`.
        options: `bias`, `scaling`, `dropout`, `backend`, `init`, `device` and `dtype`, as for
            `AdaptedLinear`.

    Raises:
        ValueError: as for `AdaptedLinear`.
    """

    trained: ClassVar[tuple[str, ...]] = ("lora_R",)
    lora_R: nn.Parameter
    gradient_left: torch.Tensor | None
    gradient_right: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        optimal_gradient: bool = False,
        **options: Any,
    ):
        super().__init__(in_features, out_features, r, **options)
        self.optimal_gradient = optimal_gradient
        # (BᵀB)⁻¹ and (AAᵀ)⁻¹; None while A and B are orthonormal.
        self.register_buffer("gradient_left", None, persistent=False)
        self.register_buffer("gradient_right", None, persistent=False)
        if not self.weight.is_meta:
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Random orthonormal A and B, R = 0.

        Args:
            generator: CPU generator of the draws; the global one when None.

        Raises:
            RuntimeError: the adapter is merged.
        """
        self._refuse_merged("reset_adapter")
        for name, features in (("lora_A", self.in_features), ("lora_B", self.out_features)):
            gaussian = torch.randn(features, self.r, generator=generator, device="cpu")
            basis = torch.linalg.qr(gaussian).Q
            buffer = getattr(self, name)
            buffer.copy_(basis.T if name == "lora_A" else basis)
        self.lora_R.zero_()
        self._factors_changed()

    @torch.no_grad()
    def _factors_changed(self) -> None:
        self.gradient_left = self.gradient_right = None
        if not self.optimal_gradient or self.lora_A.is_meta:
            return
        inverses = inverse_grams(self.lora_A, self.lora_B)
        if inverses is not None:
            self.gradient_left, self.gradient_right = inverses

    def core(self) -> torch.Tensor:
        """R as the forward pass uses it, with the optimal gradient attached if asked for."""
        plain = self.gradient_left is None and self.scaling == 1.0
        if plain or not self.optimal_gradient:
            return self.lora_R
        return with_optimal_gradient(
            self.lora_R, self.gradient_left, self.gradient_right, self.scaling
        )

    def _derived_masters(self) -> tuple[torch.Tensor | None, ...]:
        return self.gradient_left, self.gradient_right


class LoRALinear(AdaptedLinear):
    """`y = x (W + s·B·A)ᵀ + bias` with W and bias frozen, A and B trained (arXiv:2106.09685).

    `lora_R` is None, and `lora_A` [r, n] and `lora_B` [m, r] are fp32 parameters that stay fp32
    under `half()`, `bfloat16()` and `to(dtype)` and are used in the dtype of the input. A new
    layer has Kaiming-uniform A and B = 0: it computes the frozen layer.

    Args:
        in_features: n.
        out_features: m.
        r: rank, at most min(m, n).
        options: `bias`, `scaling`, `dropout`, `backend`, `init`, `device` and `dtype`, as for
            `AdaptedLinear`.

    Raises:
        ValueError: as for `AdaptedLinear`.
    """

    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    lora_R: None

    def __init__(self, in_features: int, out_features: int, r: int, **options: Any):
        super().__init__(in_features, out_features, r, **options)
        if not self.weight.is_meta:
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """A uniform in ±1/√n (Kaiming's bound with a = √5, as in peft), B = 0.

        Args:
            generator: CPU generator of the draws; the global one when None.

        Raises:
            RuntimeError: the adapter is merged.
        """
        self._refuse_merged("reset_adapter")
        self.lora_A.copy_(kaiming_uniform((self.r, self.in_features), generator))
        self.lora_B.zero_()


def kaiming_uniform(
    shape: tuple[int, int], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform in ±1/√n for a weight [m, n]: what `nn.Linear` and LoRA's A start from, fp32."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


__all__ = ["LoRALinear", "LoRASBLinear", "inverse_grams", "kaiming_uniform"]
