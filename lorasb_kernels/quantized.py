"""`QuantizedLoRASBLinear`: an adapter around a layer whose weight is quantized (QLoRA style)."""

import torch
from torch import nn

from lorasb_kernels.functional import lorasb_around
from lorasb_kernels.nn import LoRASBLinear
from lorasb_kernels.quantization import dense_weight, prevent_repacking, quantization_of


class QuantizedLoRASBLinear(LoRASBLinear):
    """`y = base_layer(x) + s·x Aᵀ Rᵀ Bᵀ` with a quantized `base_layer`; R is trained.

    Made by `from_linear`, out of a bitsandbytes or torchao layer, which computes the frozen
    product with its own kernel. Everything else is as in `LoRASBLinear`, except that `weight`
    and `bias` are None until `merge(dequantize=dtype)`.
    """

    def _hold(self, linear: nn.Linear) -> None:
        self.weight = self.bias = None
        self.base_layer = linear
        prevent_repacking(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        if self.merged:
            return super().forward(x)
        return lorasb_around(
            x,
            self.base_layer,
            self.dense_weight,
            self.lora_A,
            self.core(),
            self.lora_B,
            self.scaling,
            self.dropout_p,
            self.training,
            self.backend,
        )

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
            keep_original: no matter: `unmerge` always goes back to the quantized layer.
            dequantize: dtype of the merged weight, that of the model's other weights. It is not
                quantized again, which would round most of the adapter away.

        Raises:
            ValueError: `dequantize` is None, or `safe_merge` found a non-finite element.
        """
        if self.merged:
            return
        if dequantize is None:
            raise ValueError(
                f"the weight is quantized ({quantization_of(self)}); expected dequantize, the "
                "dtype of a plain weight to merge into, or the adapter merged into the model it "
                "was quantized from"
            )
        weight = self.dense_weight().to(self.lora_R.dtype)
        merged = (weight + self.get_delta_weight()).to(dequantize)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; the adapter seems to be broken")
        self.weight = nn.Parameter(merged, requires_grad=False)
        if self.base_layer.bias is not None:
            bias = self.base_layer.bias.detach().to(merged.dtype)
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Goes back to the quantized layer, which merging left as it was."""
        self.weight = self.bias = None
        self.merged = False


__all__ = ["QuantizedLoRASBLinear"]
