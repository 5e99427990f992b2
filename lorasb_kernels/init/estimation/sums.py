"""What the strategies share: the model, the samples, the sums, and the checks of a result."""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorasb_kernels.init.estimation import ranks
from lorasb_kernels.init.estimation.frozen_eval import estimation_mode
from lorasb_kernels.init.estimation.gradient_sums import GradientSums
from lorasb_kernels.init.estimation.losses import summed_loss
from lorasb_kernels.init.estimation.options import EstimationOptions
from lorasb_kernels.quantization import weight_dtype
from lorasb_kernels.utils.progress import progress_bar

# Keeps float16 gradients above the smallest float16, 6e-8; a power of two causes no rounding.
FLOAT16_LOSS_SCALE = 1024.0


class Estimation:
    """One estimation of the summed gradients of `layers` over `batches`.

    Between two calls of `step()` the model is unchanged.

    Args:
        model: the model.
        layers: the target layers by name.
        batches: this rank's micro-batches.
        options: loss, strategy and memory budget.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        batches: list[Any],
        options: EstimationOptions,
        progress: bool,
    ):
        self.model, self.layers, self.batches = model, layers, batches
        self.options, self.progress = options, progress
        self.sums = GradientSums(layers)
        self.device = next(iter(layers.values())).weight.device
        half = any(weight_dtype(layer) == torch.float16 for layer in layers.values())
        self._loss_scale = FLOAT16_LOSS_SCALE if half else 1.0
        self._zero: list[str] = []

    @contextmanager
    def step(self, names: Iterable[str]) -> Iterator[None]:
        """Prepares the model for passes that sum the gradients of `names`, on every rank."""
        try:
            with (
                ranks.in_step(self.device),
                estimation_mode(self.model),
                self.sums.attached(names),
            ):
                yield
        except BaseException:
            self.sums.clear()
            raise

    def loss(self, index: int) -> torch.Tensor:
        """The summed loss of micro-batch `index`, scaled; runs the forward pass."""
        total = summed_loss(self.model, self.batches[index], self.options.loss_fn, index)
        return total if self._loss_scale == 1 else total.float() * self._loss_scale

    def bar(self, total: int, strategy: str):
        """A progress bar of `total` passes over a micro-batch."""
        return progress_bar(total, f"estimating updates ({strategy})", "pass", self.progress)

    def finish(self, name: str) -> torch.Tensor:
        """The complete sum of `name`, over all ranks, checked.

        Raises:
            FloatingPointError: it is not finite.
            ValueError: the layer was only run with gradients off.
        """
        total = ranks.sum_(self.sums.pop(name))
        if self._loss_scale != 1:
            total /= self._loss_scale
        low, high = (bound.item() for bound in torch.aminmax(total))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError(self._locate_nonfinite(name))
        if low == high == 0:
            self._refuse_gradients_off(name)
            self._zero.append(name)
        return total

    def conclude(self) -> None:
        """Reports layers whose gradient is zero everywhere.

        Raises:
            ValueError: that is every layer.
        """
        if not self._zero:
            return
        layers_by_reason: dict[str, list[str]] = {}
        for name in self._zero:
            layers_by_reason.setdefault(self._why_zero(name), []).append(name)
        reasons = "; ".join(
            f"{len(names)} {reason}, such as {names[0]}"
            for reason, names in layers_by_reason.items()
        )
        if len(self._zero) == len(self.layers):
            raise ValueError(f"the gradient of every target layer is zero: {reasons}")
        warnings.warn(
            f"the gradient of {len(self._zero)} of {len(self.layers)} target layers is zero, "
            f"so their update is zero: {reasons}",
            stacklevel=2,
        )

    def _refuse_gradients_off(self, name: str) -> None:
        if name in self.sums.called_without_gradients and name not in self.sums.reached:
            raise ValueError(
                f"layer {name} is run with gradients off, so it has none; expected the model not "
                "to use no_grad there, nor a reentrant checkpoint whose inputs do not require "
                "grad (use_reentrant=False, or model.enable_input_require_grads())"
            )

    def _why_zero(self, name: str) -> str:
        if name not in self.sums.called:
            return "not called in the forward pass"
        if name not in self.sums.reached:
            return "not reached by the backward pass (the loss does not depend on it)"
        return "with gradients that are exactly zero (are all labels ignored?)"

    def _locate_nonfinite(self, name: str) -> str:
        """Repeats the passes one by one to find the micro-batch that made the sum non-finite."""
        for index in range(len(self.batches)):
            with estimation_mode(self.model), self.sums.attached([name]):
                self.loss(index).backward()
            if not torch.isfinite(self.sums.pop(name)).all():
                return f"the gradient of layer {name} is not finite in batch {index}"
        return (
            f"the summed gradient of layer {name} is not finite, though that of each batch is: "
            "float32 overflowed, or the batch is another rank's"
        )


__all__ = ["Estimation"]
