"""What an adapter costs: layers, ranks, trainable and frozen elements, bytes, operations."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.linear_layers import is_linear, matrix_shape
from lorasb_kernels.quantization import frozen_bytes, parameter_count, weight_dtype
from lorasb_kernels.targets import (
    Coverage,
    adapted_layers,
    coverage_of,
    find_saved_modules,
    head_modules,
    refuse_adapted,
    select_layers,
)


@dataclass(frozen=True)
class LayerDescription:
    """One adapted layer: m×n weight, rank r; counts in elements, sizes in bytes.

    `subspace` counts the frozen A and B: 0 in LoRA, where they are `trainable`.
    """

    name: str
    out_features: int
    in_features: int
    r: int
    trainable: int
    subspace: int
    frozen_bytes: int
    adapter_bytes: int


@dataclass(frozen=True)
class Description:
    """The adapted layers of a model; `str()` gives a table, a row for
    each kind of layer.

    `other_trainable` counts trainable elements outside the layers (`modules_to_save`),
    `total` all parameters of the base model; `linear_weights` the weight elements of the linear
    layers that every token passes, `head_weights` of those that a sequence passes once, which is
    the head of a sequence classifier; `coverage` what of the model is adapted.
    """

    layers: tuple[LayerDescription, ...]
    other_trainable: int
    total: int
    linear_weights: int
    head_weights: int
    coverage: Coverage

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of a forward pass over one sequence of `tokens` tokens.

        Those of the model's linear layers and of the adapters, as the papers count them:
        m·n + r·(m + n) + r² per token and adapted layer (no r² without a core). Embeddings,
        normalizations and attention scores are not counted. Each is two FLOPs.
        """
        adapters = sum(layer.trainable + layer.subspace for layer in self.layers)
        return (self.linear_weights + adapters) * tokens + self.head_weights

    @property
    def trainable(self) -> int:
        """Trainable elements of the adapters."""
        return sum(layer.trainable for layer in self.layers)

    def __str__(self) -> str:
        share = 100 * (self.trainable + self.other_trainable) / max(self.total, 1)
        note = (
            f"trainable: {self.trainable:,} in adapters, {self.other_trainable:,} in saved "
            f"modules; {share:.4f} % of {self.total:,} parameters"
        )
        head = ("layer", "count", "shape", "r", "trained", "A and B", "W MB", "+ MB")
        kinds = _by_kind(self.layers)
        table = [head, *(_row(name, layers) for name, layers in kinds.items())]
        table.append((f"{len(self.layers)} layers", "", "", "", *_row("", self.layers)[4:]))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        rule = "-" * max(len(line) for line in lines)
        parts = [note, str(self.coverage), "", lines[0], rule, *lines[1:-1], rule, lines[-1]]
        return "\n".join(parts)


def _by_kind(layers: Sequence[LayerDescription]) -> dict[str, list[LayerDescription]]:
    """Layers of one place in their block, of one shape and rank, under a common name."""
    found: dict[tuple, list[LayerDescription]] = {}
    for layer in layers:
        place = re.sub(r"\.\d+(?=\.)", ".*", layer.name)
        found.setdefault((place, layer.out_features, layer.in_features, layer.r), []).append(layer)
    ends = [place.rpartition("*.")[2] for place, *_ in found]
    return {
        # Where two kinds end alike (encoder and decoder), the whole place tells them apart.
        end if ends.count(end) == 1 else f"{place} {m}x{n} r {r}": layers
        for end, ((place, m, n, r), layers) in zip(ends, found.items(), strict=True)
    }


def _row(name: str, layers: Sequence[LayerDescription]) -> tuple[str, ...]:
    first = layers[0]
    return (
        name,
        str(len(layers)),
        f"{first.out_features}x{first.in_features}",
        str(first.r),
        f"{sum(layer.trainable for layer in layers):,}",
        f"{sum(layer.subspace for layer in layers):,}",
        f"{sum(layer.frozen_bytes for layer in layers) / 1e6:.2f}",
        f"{sum(layer.adapter_bytes for layer in layers) / 1e6:.3f}",
    )


def describe(model: nn.Module, config: LoRASBConfig | None = None) -> Description:
    """Describes the adapters of a model, or those that `config` would give it.

    Args:
        model: an adapted model, or with `config` a plain one, meta tensors included.
        config: what `adapt` would be called with. The model is not run, so layers that `adapt`
            would find to be passed by count as adapted.

    Raises:
        ValueError: neither adapters nor a configuration, or targets that `adapt` refuses.
    """
    layers: Mapping[str, nn.Module]
    if config is None:
        layers = adapted = adapted_layers(model)
        if not layers:
            raise ValueError("the model holds no adapter; expected one, or a config to plan with")
        ranks = {name: layer.r for name, layer in adapted.items()}
        has_core = next(iter(adapted.values())).lora_R is not None
        adapters = [p for layer in adapted.values() for p in layer.factors().values()]
        trained = {id(p): p.numel() for p in adapters if isinstance(p, nn.Parameter)}
        other = sum(
            p.numel() for p in model.parameters() if p.requires_grad and id(p) not in trained
        )
        total = parameter_count(model) - sum(trained.values())
        reasons: Mapping[str, str] = getattr(model, "lorasb_skipped", {})
        own_config = getattr(model, "lorasb_config", None)
        modules_to_save = () if own_config is None else own_config.modules_to_save
    else:
        refuse_adapted(model)
        selection = select_layers(model, config.target_modules, config.modules_to_save, config.r)
        layers, reasons = selection.layers, selection.skipped
        ranks = dict.fromkeys(layers, config.r)
        has_core = config.facts.has_core
        modules_to_save = config.modules_to_save
        saved = find_saved_modules(model, modules_to_save)
        other = sum(p.numel() for module in saved.values() for p in module.parameters())
        total = parameter_count(model)
    linear_weights, head_weights = _linear_weights(model)
    described = tuple(_describe_layer(name, layers[name], ranks[name], has_core) for name in layers)
    coverage = coverage_of(model, layers, reasons, modules_to_save)
    return Description(described, other, total, linear_weights, head_weights, coverage)


def _linear_weights(model: nn.Module) -> tuple[int, int]:
    """Weight elements of the linear layers that every token passes, and of a classifier's head."""
    heads = set()
    if type(model).__name__.endswith("ForSequenceClassification"):
        heads = head_modules(model)
    each_token = once = 0
    for module in model.modules():
        if is_linear(module):
            weights = math.prod(matrix_shape(module))
            if id(module) in heads:
                once += weights
            else:
                each_token += weights
    return each_token, once


def _describe_layer(name: str, linear: nn.Module, r: int, has_core: bool) -> LayerDescription:
    m, n = matrix_shape(linear)
    factors = r * (m + n)
    trained, frozen = (r * r, factors) if has_core else (factors, 0)
    return LayerDescription(
        name=name,
        out_features=m,
        in_features=n,
        r=r,
        trainable=trained,
        subspace=frozen,
        frozen_bytes=frozen_bytes(linear),
        adapter_bytes=frozen * weight_dtype(linear).itemsize + trained * 4,
    )


__all__ = ["Description", "LayerDescription", "describe"]
