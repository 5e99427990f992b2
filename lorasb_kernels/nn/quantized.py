"""Adapters around layers whose weight is quantized (QLoRA style)."""

from typing import Any

import torch
from torch import nn

from lorasb_kernels.functional import FrozenLayer
from lorasb_kernels.nn.adapted import AdaptedLinear, check_finite
from lorasb_kernels.nn.linear import LoRALinear, LoRASBLinear
from lorasb_kernels.nn.merging import merged_weight
from lorasb_kernels.quantization import dense_weight, prevent_repacking, quantization_of


class _Quantized(AdaptedLinear):
    """What an adapted layer does differently when its frozen layer is a quantized `base_layer`."""

    base_layer: nn.Linear
    weight: nn.Parameter | None  # type: ignore[assignment]  # None unless merged
    bias: nn.Parameter | None  # type: ignore[assignment]

    def _hold(self, linear: Any) -> None:
        self.weight = self.bias = None
        self.base_layer = linear
        prevent_repacking(linear)

    def frozen_weight(self) -> FrozenLayer:
        """The layer and its dequantized weight, in the form that the operation takes as W."""
        shape = (self.out_features, self.in_features)
        return FrozenLayer(shape, self.base_layer, self.dense_weight)

    def frozen_output(self, x: torch.Tensor) -> torch.Tensor:
        """What the quantized layer computes, [..., m], without the adapter."""
        return self.base_layer(x)

    def dense_weight(self) -> torch.Tensor:
        """W [m, n], dequantized."""
        return dense_weight(self.base_layer)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        keep_original: bool = False,
        dequantize: torch.dtype | None = None,
    ) -> None:
        """Computes with the dequantized weight plus the adapter from now on, in fp32 with one
        rounding.

        Args:
            safe_merge: raise if the sum is not finite.
            keep_original: ignored; `unmerge` always restores the quantized layer.
            dequantize: dtype of the merged weight, that of the model's other weights. It is not
                quantized again, which would round most of the adapter away.

        Raises:
            ValueError: `dequantize` is None, or `safe_merge` found a non-finite element.
        """
        if self.merged:
            return
        self._refuse_without_effect()
        if dequantize is None:
            raise ValueError(
                f"the weight is quantized ({quantization_of(self)}); expected dequantize, the "
                "dtype of a plain weight to merge into, or the adapter merged into the model it "
                "was quantized from"
            )
        merged = merged_weight(self.dense_weight(), self.get_delta_weight(), dequantize)
        check_finite(merged, safe_merge)
        self.weight = nn.Parameter(merged, requires_grad=False)
        if self.base_layer.bias is not None:
            bias = self.base_layer.bias.detach().to(merged.dtype)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def without_adapter(self) -> nn.Module:
        """The quantized layer that was wrapped."""
        self._refuse_merged("without_adapter")
        return self.base_layer

    def unmerge(self) -> None:
        """Restores the quantized layer, which merging did not change."""
        self.weight = self.bias = None

    @property
    def merged(self) -> bool:
        """Whether the layer computes with a merged weight."""
        return self._parameters.get("weight") is not None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The merged weight is computed from the rest and is no part of the state."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class QuantizedLoRASBLinear(_Quantized, LoRASBLinear):
    """`y = base_layer(x) + s·x Aᵀ Rᵀ Bᵀ` with a quantized `base_layer`; R is trained.

    Made by `from_linear` from a bitsandbytes or torchao layer, which computes the frozen
    product with its own kernel. Everything else is as in `LoRASBLinear`, except that `weight`
    and `bias` are None until `merge(dequantize=dtype)`.
    """


class QuantizedLoRALinear(_Quantized, LoRALinear):
    """`y = base_layer(x) + s·x Aᵀ Bᵀ` with a quantized `base_layer`; A and B are trained.

    The quantized counterpart of `LoRALinear`.
    """


__all__ = ["QuantizedLoRALinear", "QuantizedLoRASBLinear"]
