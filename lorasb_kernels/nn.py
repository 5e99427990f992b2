"""`LoRASBLinear`: a frozen `nn.Linear` with an adapter whose r×r core is trained."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.quantization import weight_dtype


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
        optimal_gradient: turn the gradient of R into the optimal one,
            `(1/s²)·(BᵀB)⁻¹ g (AAᵀ)⁻¹` (arXiv:2411.19557, theorem 3). With orthonormal A, B
            and s = 1 that is the plain gradient, and nothing is done.
        init: name of the initialization, for display.
        device: device of the parameters and buffers.
        dtype: dtype of weight, bias, A and B.

    Raises:
        ValueError: r outside 1 … min(m, n), a scaling that is 0 or not finite, dropout
            outside [0, 1).
    """

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
        factory = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.register_buffer("lora_A", torch.empty(r, in_features, **factory))
        self.register_buffer("lora_B", torch.empty(out_features, r, **factory))
        core_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_R = nn.Parameter(torch.zeros(r, r, device=factory["device"], dtype=core_dtype))
        self.register_buffer("gradient_left", None, persistent=False)
        self.register_buffer("gradient_right", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda layer, _: layer._set_gradient_factors())
        if not self.weight.is_meta:
            self.reset_adapter()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int, *, reset: bool = True, **options
    ) -> "LoRASBLinear":
        """Wraps `linear`; weight and bias share its storage, its flags stay as they are.

        Args:
            linear: the layer to adapt.
            r: rank.
            reset: draw random orthonormal A and B; otherwise the factors are 0 until
                `set_adapter` gives them.
            options: keyword arguments of the constructor, from `scaling` to `init`.
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
        device = linear.weight.device
        layer.lora_A = torch.zeros_like(layer.lora_A, device=device)
        layer.lora_B = torch.zeros_like(layer.lora_B, device=device)
        layer.lora_R = nn.Parameter(torch.zeros_like(layer.lora_R, device=device))
        layer.train(linear.training)
        if reset and not linear.weight.is_meta:
            layer.reset_adapter()
        return layer

    def _hold(self, linear: nn.Linear) -> None:
        """Takes the frozen weight and bias of `linear` for its own."""
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
    def set_adapter(self, lora_A: torch.Tensor, lora_R: torch.Tensor, lora_B: torch.Tensor):
        """Copies the three factors in; A and B are rounded to the weight's dtype.

        Raises:
            ValueError: a factor of the wrong shape.
            RuntimeError: the adapter is merged.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged; expected unmerge() before set_adapter()")
        for name, value in (("lora_A", lora_A), ("lora_R", lora_R), ("lora_B", lora_B)):
            own = getattr(self, name)
            if value.shape != own.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected {tuple(own.shape)}"
                )
        self.lora_A.copy_(lora_A)
        self.lora_R.copy_(lora_R)
        self.lora_B.copy_(lora_B)
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
        inverse_A = torch.linalg.inv(gram_A.double()) / self.scaling
        inverse_B = torch.linalg.inv(gram_B.double()) / self.scaling
        self.gradient_left, self.gradient_right = inverse_B.to(dtype), inverse_A.to(dtype)

    def core(self) -> torch.Tensor:
        """R as the forward pass uses it, with the optimal gradient attached if asked for."""
        if self.gradient_left is None:
            return self.lora_R
        return _OptimalGradient.apply(self.lora_R, self.gradient_left, self.gradient_right)

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
            self.weight,
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
        """`s·B·R·A`, [m, n], computed and returned in the dtype of R (fp32)."""
        dtype = self.lora_R.dtype
        with torch.autocast(self.lora_R.device.type, enabled=False):
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_R) @ self.lora_A.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, keep_original: bool = False) -> None:
        """Adds the adapter to the weight in place, in fp32 with one rounding.

        Args:
            safe_merge: raise, with the weight untouched, if the sum is not finite.
            keep_original: keep a copy of the weight, so that `unmerge` restores every bit.

        Raises:
            ValueError: `safe_merge` found a non-finite element.
        """
        if self.merged:
            return
        merged = (self.weight.to(self.lora_R.dtype) + self.get_delta_weight()).to(self.weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; the adapter seems to be broken")
        if keep_original:
            self._original_weight = self.weight.clone()
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out of the weight: exactly if the original was kept, else to a
        rounding."""
        if not self.merged:
            return
        if self._original_weight is not None:
            self.weight.copy_(self._original_weight)
            self._original_weight = None
        else:
            self.weight.copy_(self.weight.to(self.lora_R.dtype) - self.get_delta_weight())
        self.merged = False

    def _apply(self, fn, recurse=True):
        """Moves R and its gradient between devices but never out of fp32."""
        kept = {
            id(tensor)
            for tensor in (
                self.lora_R,
                self.lora_R.grad,
                self.gradient_left,
                self.gradient_right,
            )
            if tensor is not None
        }

        def keep_core_dtype(tensor):
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_core_dtype, recurse)

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


__all__ = ["LoRASBLinear"]
