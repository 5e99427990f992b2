"""What every adapted layer is: a frozen `nn.Linear` with factors A, R and B."""

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels.functional import FrozenLayer, lorasb_linear
from lorasb_kernels.linear_layers import is_conv1d, matrix_shape
from lorasb_kernels.nn.masters import masters_kept
from lorasb_kernels.nn.merging import delta_weight, merged_weight, plain_factors
from lorasb_kernels.quantization import quantization_of, weight_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

# One call for torch.fx, as nn.Linear is: its checks and its choice of a backend want tensors.
torch.fx.wrap("lorasb_linear")


class AdaptedLinear(nn.Linear):
    """`y = x (W + s·B·R·A)ᵀ + bias` with W and bias frozen: the base of all adapted layers.

    A subclass says which factors are trained. Those are parameters in fp32 (fp64 with an fp64
    weight), and stay so under `half()`, `bfloat16()` and `to(dtype)`; the others are buffers in
    the dtype of the weight. A subclass that does not train R has none: `lora_R` is None.

    Over transformers' Conv1D the layer keeps that layer's parameter: `weight` is [n, m] then,
    `transposed` is True, and `matrix` is W [m, n] in any case.

    Whether the adapter is merged is part of the state: the state dict of a merged layer contains
    what was merged, and loading a state dict also restores whether the layer is merged.

    Args:
        in_features: n.
        out_features: m.
        r: rank, at most min(m, n).
        bias: whether the frozen layer has a bias.
        scaling: s.
        dropout: probability that an element of the adapter's input is dropped.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
        init: name of the initialization, for display.
        device: device of the parameters and buffers.
        dtype: dtype of weight and bias, and of the factors that are not trained.

    Raises:
        ValueError: r outside 1 … min(m, n), a scaling that is 0 or not finite, dropout
            outside [0, 1).
    """

    trained: ClassVar[tuple[str, ...]] = ()
    optimal_gradient = False
    disabled = False  # set by `adapters_disabled`
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_R: torch.Tensor | None
    merged_A: torch.Tensor | None
    merged_B: torch.Tensor | None
    original_weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        bias: bool = True,
        scaling: float = 1.0,
        dropout: float = 0.0,
        backend: str = "auto",
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
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.backend = backend
        self.init = init
        self.init_report: Any = None  # set by `adapt` if an SVD initialized the layer
        self.shared_input: Any = None  # set by `share_inputs`: the siblings computed together
        self.transposed = False  # whether `weight` is [n, m]
        self.reached: bool | None = None  # by training: set by `watch_training`; None if unknown
        self._replaced: tuple[nn.Module, ...] = ()  # the layer wrapped, without its tensors
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_R": (r, r)}
        for name, shape in shapes.items():
            self._register_factor(name, shape)
        # What was merged, as plain LoRA; None if nothing is merged.
        self.register_buffer("merged_A", None)
        self.register_buffer("merged_B", None)
        self.register_buffer("original_weight", None, persistent=False)

    def _register_factor(self, name: str, shape: tuple[int, int]) -> None:
        dtype, device = self.weight.dtype, self.weight.device
        if name in self.trained:
            dtype = torch.promote_types(dtype, torch.float32)
            factor = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            self.register_parameter(name, factor)
        elif name == "lora_R":
            self.register_parameter(name, None)
        else:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def factors(self) -> dict[str, torch.Tensor]:
        """The adapter's factors by name; `lora_R` only if there is a core."""
        named = {name: getattr(self, name) for name in ("lora_A", "lora_R", "lora_B")}
        return {name: factor for name, factor in named.items() if factor is not None}

    @classmethod
    def from_linear(cls, linear: Any, r: int, *, reset: bool = True, **options: Any) -> "Self":
        """Wraps `linear`; weight and bias share its storage and keep their `requires_grad`.

        Args:
            linear: the layer to adapt: an `nn.Linear`, of a subclass with the same forward or
                transformers' Conv1D.
            r: rank.
            reset: draw the factors with `reset_adapter`; otherwise they are 0 until
                `set_adapter` gives them.
            options: keyword arguments of the constructor, from `scaling` to `init`.

        Raises:
            TypeError: a quantized layer; see `lorasb_kernels.nn.QuantizedLoRASBLinear`.
        """
        m, n = matrix_shape(linear)
        layer = cls(
            n,
            m,
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

    def _hold(self, linear: Any) -> None:
        """Uses the frozen weight and bias of `linear`, and remembers what kind of layer it is."""
        if (kind := quantization_of(linear)) is not None:
            raise TypeError(
                f"linear is quantized ({kind}); expected a plain nn.Linear, or from_linear() of "
                f"lorasb_kernels.nn.Quantized{type(self).__name__}"
            )
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.transposed = is_conv1d(linear)
        if type(linear) is not nn.Linear:
            empty: nn.Module = copy.copy(linear)
            empty._parameters = dict.fromkeys(linear._parameters)
            self._replaced = (empty,)  # in a tuple, as it is no submodule

    @property
    def matrix(self) -> torch.Tensor:
        """W [m, n], a view of `weight`."""
        return self.weight.T if self.transposed else self.weight

    def to_linear(self) -> nn.Module:
        """The plain layer that computes the same thing, sharing this one's (merged) weight.

        Of the kind that was wrapped.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged; expected merge() before to_linear()")
        return self._plain_layer()

    def without_adapter(self) -> nn.Module:
        """The layer that was wrapped, as it was."""
        self._refuse_merged("without_adapter")
        return self._plain_layer()

    def _plain_layer(self) -> nn.Module:
        if self._replaced:
            linear = copy.copy(self._replaced[0])
            linear._parameters = dict(linear._parameters)
        else:
            has_bias = self.bias is not None
            linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """Draws new factors; with them the layer computes what the frozen layer computes.

        Args:
            generator: CPU generator of the draws; the global one when None.

        Raises:
            RuntimeError: the adapter is merged.
        """
        raise NotImplementedError

    @torch.no_grad()
    def set_adapter(
        self, lora_A: torch.Tensor, lora_R: torch.Tensor | None, lora_B: torch.Tensor
    ) -> None:
        """Sets the factors, rounded to the dtypes of the layer's own.

        Raises:
            ValueError: a factor of the wrong shape, or a core for a layer without one.
            RuntimeError: the adapter is merged.
        """
        self._refuse_merged("set_adapter")
        given = {"lora_A": lora_A, "lora_R": lora_R, "lora_B": lora_B}
        for name, value in given.items():
            own = self.factors().get(name)
            shape, expected = (None if t is None else tuple(t.shape) for t in (value, own))
            if shape != expected:
                raise ValueError(f"{name} has shape {shape}; expected {expected}")
        for name, own in self.factors().items():
            if (value := given[name]) is not None:
                own.copy_(value)
        self._factors_changed()

    def _refuse_merged(self, method: str) -> None:
        if self.merged:
            raise RuntimeError(f"the adapter is merged; expected unmerge() before {method}()")

    def _factors_changed(self) -> None:
        """Called after A and B have been set or loaded."""

    def core(self) -> torch.Tensor | None:
        """R as the forward pass uses it."""
        return self.lora_R

    def frozen_weight(self) -> torch.Tensor | FrozenLayer:
        """What is passed to the operation as W."""
        return self.matrix

    def frozen_output(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + bias, [..., m], without the adapter."""
        return F.linear(x, self.matrix, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        if self.merged:
            return F.linear(x, self.matrix, self.bias)
        if self.disabled:
            return self.frozen_output(x)
        if self.shared_input is not None:
            output = self.shared_input.forward(self, x)
            if output is not None:
                return output
        # From where `nn.Module` keeps them: to find one as an attribute costs a microsecond.
        held: dict[str, Any] = {**self._buffers, **self._parameters}
        try:
            weight, bias = held["weight"], held["bias"]
            lora_A, lora_R, lora_B = held["lora_A"], held["lora_R"], held["lora_B"]
        except KeyError:  # made an attribute (FSDP), or computed (parametrizations)
            weight, bias = self.weight, self.bias
            lora_A, lora_R, lora_B = self.lora_A, self.lora_R, self.lora_B
        if weight is None or self.transposed:
            weight = self.frozen_weight()
        return lorasb_linear(
            x,
            weight,
            lora_A,
            self.core() if self.optimal_gradient else lora_R,
            lora_B,
            bias,
            self.scaling,
            self.dropout,
            self.training,
            self.backend,
        )

    def get_delta_weight(self) -> torch.Tensor:
        """`s·B·R·A`, [m, n], computed and returned in fp32 (fp64 with an fp64 weight)."""
        return delta_weight(self.lora_A, self.lora_R, self.lora_B, self.scaling)

    def plain_lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A' = R·A [r, n] and B' = s·B [m, r], the same adapter as LoRA without core or scaling."""
        return plain_factors(self.lora_A, self.lora_R, self.lora_B, self.scaling)

    @property
    def merged(self) -> bool:
        """Whether the weight includes the adapter."""
        return self._buffers.get("merged_A") is not None

    def without_effect(self) -> bool:
        """Whether training never reached the layer, though its adapter is not zero."""
        return self.reached is False and bool(self.get_delta_weight().any())

    def _refuse_without_effect(self) -> None:
        if self.without_effect():
            raise ValueError(
                "training never reached this layer: the model does not call it, or reads its "
                "weight past it, so that merging would change the model"
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, keep_original: bool = False) -> None:
        """Adds the adapter to the weight in place, in fp32 with one rounding.

        Until `unmerge` the layer computes with that weight; changes of the factors before that
        take effect after `unmerge`.

        Args:
            safe_merge: raise, with the weight unchanged, if the sum is not finite.
            keep_original: keep a copy of the weight, so that `unmerge` restores every bit.

        Raises:
            ValueError: `safe_merge` found a non-finite element, or training never reached the
                layer, so that merging could change what the model computes.
        """
        if self.merged:
            return
        self._refuse_without_effect()
        lora_A, lora_B = self.plain_lora()
        merged = merged_weight(self.matrix, delta_weight(lora_A, None, lora_B, 1.0))
        check_finite(merged, safe_merge)
        if keep_original:
            self.original_weight = self.weight.detach().clone()
        self.matrix.copy_(merged)
        self.merged_A, self.merged_B = lora_A.clone(), lora_B

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight: exactly if the original was kept, otherwise up to rounding."""
        if self.merged_A is None or self.merged_B is None:
            return
        if self.original_weight is not None:
            self.weight.copy_(self.original_weight)
        else:
            delta = delta_weight(self.merged_A, None, self.merged_B, -1.0)
            self.matrix.copy_(merged_weight(self.matrix, delta))
        self.merged_A = self.merged_B = self.original_weight = None

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        if f"{prefix}weight" in state_dict:
            self.merged_A = self.merged_B = self.original_weight = None
            if f"{prefix}merged_A" in state_dict:
                self.merged_A, self.merged_B = (
                    torch.empty_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
                    for factor in (self.lora_A, self.lora_B)
                )
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._factors_changed()

    def _apply(self, fn, recurse=True):
        """Moves what is trained, and what was merged, between devices but never below fp32."""
        masters = [self.merged_A, self.merged_B, *self._derived_masters()]
        for name in self.trained:
            masters += [getattr(self, name), getattr(self, name).grad]
        return super()._apply(masters_kept(fn, masters), recurse)

    def _derived_masters(self) -> tuple[torch.Tensor | None, ...]:
        """Further tensors of a subclass that stay in fp32."""
        return ()

    def extra_repr(self) -> str:
        parts = [
            super().extra_repr(),
            f"r={self.r}, scaling={self.scaling:g}, init={self.init!r}, backend={self.backend!r}",
        ]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.merged:
            parts.append("merged")
        return ", ".join(parts)


def check_finite(merged: torch.Tensor, wanted: bool) -> None:
    """If `wanted`, raises ValueError when `merged` is not finite."""
    if wanted and not merged.isfinite().all():
        raise ValueError("the merged weight is not finite; the adapter seems to be broken")


__all__ = ["AdaptedLinear", "check_finite"]
