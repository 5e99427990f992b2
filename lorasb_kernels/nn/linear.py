"""A frozen `nn.Linear` with an adapter: `LoRASBLinear` trains its core, `LoRALinear` A and B."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels.functional import FrozenLayer, lorasb_linear
from lorasb_kernels.quantization import quantization_of, weight_dtype


class _OptimalGradient(torch.autograd.Function):
    """Identity on R; its gradient G becomes `left · G · right`."""

    @staticmethod
    def forward(ctx, lora_R, left, right):
        ctx.save_for_backward(left, right)
        return lora_R.view_as(lora_R)

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        return left @ gradient @ right, None, None


class LoRASBLinear(nn.Linear):
    """`y = x (W + s·B·R·A)ᵀ + bias` with W, bias, A, B frozen and R trained.

    `lora_A` [r, n] and `lora_B` [m, r] are buffers in the dtype of the weight; `lora_R`
    [r, r] is an fp32 parameter and stays fp32 under `half()`, `bfloat16()` and `to(dtype)`.
    A new layer has random orthonormal A and B and R = 0: it computes the frozen layer.

    Args:
        in_features: n.
        out_features: m.
        r: rank, at most min(m, n).
        bias: whether the frozen layer has a bias.
        scaling: s.
        dropout_p: dropout probability on the adapter's input.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
        optimal_gradient: replace the gradient of R by the optimal one,
            `(1/s²)·(BᵀB)⁻¹ g (AAᵀ)⁻¹` (arXiv:2411.19557, theorem 3). With orthonormal A, B
            and s = 1 that is the plain gradient, which is then used as it is.
        init: name of the initialization, for display.
        device: device of the parameters and buffers.
        dtype: dtype of weight, bias, A and B.

    Raises:
        ValueError: r outside 1 … min(m, n), a scaling that is 0 or not finite, dropout
            outside [0, 1), the optimal gradient for a layer without a core.
    """

    trained: ClassVar[tuple[str, ...]] = ("lora_R",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        bias: bool = True,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
        backend: str = "auto",
        optimal_gradient: bool = False,
        init: str = "orthogonal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(
                f"r is {r}; expected 1 <= r <= {min(in_features, out_features)} "
                f"for a layer of {in_features} inputs and {out_features} outputs"
            )
        if not math.isfinite(scaling) or scaling == 0:
            raise ValueError(f"scaling is {scaling}; expected finite and not 0")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
        if optimal_gradient and "lora_R" not in self.trained:
            raise ValueError("optimal_gradient is True; expected False: LoRA trains no core")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r = r
        self.scaling = scaling
        self.dropout_p = dropout_p
        self.backend = backend
        self.optimal_gradient = optimal_gradient
        self.init = init
        self.merged = False
        self.shared_input = None  # set by `share_inputs`: the siblings computed together
        self._original_weight: torch.Tensor | None = None
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_R": (r, r)}
        for name, shape in shapes.items():
            self._register_factor(name, shape)
        self.register_buffer("gradient_left", None, persistent=False)
        self.register_buffer("gradient_right", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda layer, _: layer._set_gradient_factors())
        if not self.weight.is_meta:
            self.reset_adapter()

    def _register_factor(self, name: str, shape: tuple[int, int]) -> None:
        dtype, device = self.weight.dtype, self.weight.device
        if name in self.trained:
            dtype = torch.promote_types(dtype, torch.float32)
            factor = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            self.register_parameter(name, factor)
        else:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def factors(self) -> dict[str, torch.Tensor]:
        """The adapter's factors by name; `lora_R` only if there is a core."""
        named = {name: getattr(self, name) for name in ("lora_A", "lora_R", "lora_B")}
        return {name: factor for name, factor in named.items() if factor is not None}

    @property
    def master_dtype(self) -> torch.dtype:
        """The dtype of what is trained, and of merging: fp32 (fp64 with an fp64 weight)."""
        return getattr(self, self.trained[0]).dtype

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int, *, reset: bool = True, **options
    ) -> "LoRASBLinear":
        """Wraps `linear`; weight and bias share its storage and keep their `requires_grad`.

        Args:
            linear: the layer to adapt.
            r: rank.
            reset: draw the factors with `reset_adapter`; otherwise they are 0 until
                `set_adapter` gives them.
            options: keyword arguments of the constructor, from `scaling` to `init`.

        Raises:
            TypeError: a quantized layer; see `lorasb_kernels.nn.QuantizedLoRASBLinear`.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            r,
            bias=linear.bias is not None,
            device="meta",
            dtype=weight_dtype(linear),
            **options,
        )
        layer._hold(linear)
        for name, factor in layer.factors().items():
            zeros = torch.zeros_like(factor, device=linear.weight.device)
            setattr(layer, name, nn.Parameter(zeros) if name in cls.trained else zeros)
        layer.train(linear.training)
        if reset and not linear.weight.is_meta:
            layer.reset_adapter()
        return layer

    def _hold(self, linear: nn.Linear) -> None:
        """Uses the frozen weight and bias of `linear`."""
        if (kind := quantization_of(linear)) is not None:
            raise TypeError(
                f"linear is quantized ({kind}); expected a plain nn.Linear, or from_linear() of "
                f"lorasb_kernels.nn.Quantized{type(self).__name__}"
            )
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def to_linear(self) -> nn.Linear:
        """The plain layer that computes the same thing, sharing this one's (merged) weight.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged; expected merge() before to_linear()")
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Random orthonormal A and B, R = 0.

        Args:
            generator: CPU generator of the draws; the global one when None.
        """
        for name, features in (("lora_A", self.in_features), ("lora_B", self.out_features)):
            gaussian = torch.randn(features, self.r, generator=generator, device="cpu")
            basis = torch.linalg.qr(gaussian).Q
            buffer = getattr(self, name)
            buffer.copy_(basis.T if name == "lora_A" else basis)
        self.lora_R.zero_()
        self._set_gradient_factors()

    @torch.no_grad()
    def set_adapter(
        self, lora_A: torch.Tensor, lora_R: torch.Tensor | None, lora_B: torch.Tensor
    ) -> None:
        """Sets the factors, rounded to the dtypes of the layer's own.

        Raises:
            ValueError: a factor of the wrong shape, or a core for a layer without one.
            RuntimeError: the adapter is merged.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged; expected unmerge() before set_adapter()")
        given = {"lora_A": lora_A, "lora_R": lora_R, "lora_B": lora_B}
        for name, value in given.items():
            own = self.factors().get(name)
            shape, expected = (None if t is None else tuple(t.shape) for t in (value, own))
            if shape != expected:
                raise ValueError(f"{name} has shape {shape}; expected {expected}")
        for name, own in self.factors().items():
            own.copy_(given[name])
        self._set_gradient_factors()

    @torch.no_grad()
    def _set_gradient_factors(self) -> None:
        self.gradient_left = self.gradient_right = None
        if not self.optimal_gradient or self.lora_A.is_meta:
            return
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        gram_A, gram_B = A @ A.T, B.T @ B
        identity = torch.eye(self.r, device=A.device, dtype=dtype)
        rounding = max(torch.finfo(self.lora_A.dtype).eps, 1e-5)
        deviation = max((gram_A - identity).abs().max(), (gram_B - identity).abs().max())
        if self.scaling == 1.0 and deviation <= rounding:
            return
        # The inverse for full-rank factors; otherwise the shortest of the optimal gradients.
        inverse_A, inverse_B = (
            torch.linalg.pinv(gram.double(), hermitian=True) / self.scaling
            for gram in (gram_A, gram_B)
        )
        self.gradient_left, self.gradient_right = inverse_B.to(dtype), inverse_A.to(dtype)

    def core(self) -> torch.Tensor:
        """R as the forward pass uses it, with the optimal gradient attached if asked for."""
        if self.gradient_left is None:
            return self.lora_R
        return _OptimalGradient.apply(self.lora_R, self.gradient_left, self.gradient_right)

    def frozen_weight(self) -> torch.Tensor | FrozenLayer:
        """What is passed to the operation as W."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        if self.shared_input is not None:
            output = self.shared_input.forward(self, x)
            if output is not None:
                return output
        return lorasb_linear(
            x,
            self.frozen_weight(),
            self.lora_A,
            self.core(),
            self.lora_B,
            self.bias,
            self.scaling,
            self.dropout_p,
            self.training,
            self.backend,
        )

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """`s·B·R·A`, [m, n], computed and returned in fp32 (fp64 with an fp64 weight)."""
        lora_A, lora_B = self.plain_lora()
        with torch.autocast(lora_A.device.type, enabled=False):
            return lora_B @ lora_A

    @torch.no_grad()
    def plain_lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A' = R·A [r, n] and B' = s·B [m, r], the same adapter as LoRA without core or scaling."""
        lora_A, lora_B = (factor.to(self.master_dtype) for factor in (self.lora_A, self.lora_B))
        if self.lora_R is not None:
            with torch.autocast(lora_A.device.type, enabled=False):
                lora_A = self.lora_R @ lora_A
        return lora_A, self.scaling * lora_B

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, keep_original: bool = False) -> None:
        """Adds the adapter to the weight in place, in fp32 with one rounding.

        Args:
            safe_merge: raise, with the weight unchanged, if the sum is not finite.
            keep_original: keep a copy of the weight, so that `unmerge` restores every bit.

        Raises:
            ValueError: `safe_merge` found a non-finite element.
        """
        if self.merged:
            return
        merged = (self.weight.to(self.master_dtype) + self.get_delta_weight()).to(self.weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; the adapter seems to be broken")
        if keep_original:
            self._original_weight = self.weight.clone()
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight: exactly if the original was kept, otherwise up to rounding."""
        if not self.merged:
            return
        if self._original_weight is not None:
            self.weight.copy_(self._original_weight)
            self._original_weight = None
        else:
            self.weight.copy_(self.weight.to(self.master_dtype) - self.get_delta_weight())
        self.merged = False

    def _apply(self, fn, recurse=True):
        """Moves what is trained and its gradient between devices but never out of fp32."""
        masters = [self.gradient_left, self.gradient_right]
        for name in self.trained:
            masters += [getattr(self, name), getattr(self, name).grad]
        kept = {id(tensor) for tensor in masters if tensor is not None}

        def keep_master_dtype(tensor):
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_master_dtype, recurse)

    def extra_repr(self) -> str:
        parts = [
            super().extra_repr(),
            f"r={self.r}, scaling={self.scaling:g}, init={self.init!r}, backend={self.backend!r}",
        ]
        if self.dropout_p:
            parts.append(f"dropout_p={self.dropout_p:g}")
        if self.merged:
            parts.append("merged")
        return ", ".join(parts)


class LoRALinear(LoRASBLinear):
    """`y = x (W + s·B·A)ᵀ + bias` with W and bias frozen, A and B trained (arXiv:2106.09685).

    The same layer without a core: `lora_R` is None, and `lora_A` [r, n] and `lora_B` [m, r] are
    fp32 parameters that stay fp32 under `half()`, `bfloat16()` and `to(dtype)` and are used in
    the dtype of the input. A new layer has Kaiming-uniform A and B = 0: it computes the frozen
    layer. Arguments as for `LoRASBLinear`; there is no optimal gradient of a core.
    """

    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def _register_factor(self, name: str, shape: tuple[int, int]) -> None:
        if name == "lora_R":
            self.register_parameter(name, None)
        else:
            super()._register_factor(name, shape)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """A uniform in ±1/√n (Kaiming's bound with a = √5, as in peft), B = 0.

        Args:
            generator: CPU generator of the draws; the global one when None.
        """
        self.lora_A.copy_(kaiming_uniform(self.lora_A.shape, generator))
        self.lora_B.zero_()


def kaiming_uniform(
    shape: tuple[int, int], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform in ±1/√n for a weight [m, n]: what `nn.Linear` and LoRA's A start from, fp32."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


__all__ = ["LoRALinear", "LoRASBLinear", "kaiming_uniform"]
