"""Finds the linear layers that a configuration selects, and refuses what cannot be adapted.

Only reads the model; nothing is changed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorasb_kernels.linear_layers import is_linear
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.targets.heads import head_modules
from lorasb_kernels.targets.names import is_inside, matches_suffix
from lorasb_kernels.targets.obstacles import obstacles

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Selection:
    """The layers to adapt by name, in module order, and why others are left out.

    `skipped` is empty unless the layers are those of `"all-linear"`.
    """

    layers: dict[str, Any]
    skipped: dict[str, str]


def select_layers(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    modules_to_save: tuple[str, ...] = (),
    r: int = 1,
    strict: bool = False,
) -> Selection:
    """The layers that `target_modules` selects and that can take a rank-r adapter.

    Args:
        model: any module; meta tensors are fine.
        target_modules: as in `LoRASBConfig`.
        modules_to_save: modules trained whole; nothing inside them is a target.
        r: rank.
        strict: raise for a layer of `"all-linear"` that cannot be adapted instead of leaving it
            out; a layer that is named always raises.

    Raises:
        ValueError: nothing matched, a suffix that matches nothing, or a layer with shared
            weights, hooks or r > min(m, n).
        TypeError: a layer of a kind that cannot be adapted.
    """
    candidates = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if is_linear(module) and not is_inside(name, modules_to_save)
    }
    targets = _matched(model, candidates, target_modules)
    for name, module in targets.items():
        if isinstance(module, AdaptedLinear):
            raise ValueError(f"{name} is adapted already; expected a model without adapters")
    found = obstacles(model, targets, r)
    layers = {name: module for name, module in targets.items() if name not in found}
    if found and (strict or target_modules != ALL_LINEAR or not layers):
        raise next(iter(found.values())).error
    return Selection(layers, {name: obstacle.reason for name, obstacle in found.items()})


def find_targets(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    modules_to_save: tuple[str, ...] = (),
) -> dict[str, nn.Module]:
    """The layers of `select_layers` for any rank."""
    return select_layers(model, target_modules, modules_to_save).layers


def _matched(
    model: nn.Module, candidates: dict[str, nn.Module], target_modules: str | tuple[str, ...]
) -> dict[str, nn.Module]:
    if target_modules == ALL_LINEAR:
        heads = head_modules(model)
        targets = {name: m for name, m in candidates.items() if id(m) not in heads}
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except (re.error, RecursionError) as error:
            raise ValueError(
                f"target_modules is {target_modules!r}; expected a regular expression: {error}"
            ) from error
        targets = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
    else:
        targets = {
            name: m for name, m in candidates.items() if matches_suffix(name, target_modules)
        }
        for suffix in target_modules:
            if not any(matches_suffix(name, (suffix,)) for name in targets):
                raise ValueError(_nothing_matched(suffix, candidates))
    if not targets:
        raise ValueError(_nothing_matched(target_modules, candidates))
    return targets


def _nothing_matched(target_modules, candidates: dict[str, nn.Module]) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in candidates})
    return (
        f"target_modules {target_modules!r} matched no linear layer; "
        f"the model's linear layers end in {suffixes}"
    )


def find_layers(
    model: nn.Module, names: Sequence[str], r: int, modules_to_save: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """The layers of exactly these names, as a saved adapter lists them.

    Args:
        model: a model without adapters.
        names: full names.
        r: rank.
        modules_to_save: as in `LoRASBConfig`.

    Raises:
        ValueError: no names, one that is no linear layer or inside a module trained whole, or
            a layer with meta or shared weights, hooks or r > min(m, n).
        TypeError: a layer of a kind that cannot be adapted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if not is_linear(modules.get(name))]
    if missing or not names:
        raise ValueError(
            f"{len(missing)} of the adapter's {len(names)} layers are no linear layers of the "
            f"model (such as {str(missing[:1])[:200]}); expected the base model it was made for"
        )
    for name in names:
        if is_inside(name, modules_to_save):
            raise ValueError(f"{name} is in modules_to_save and among the adapted layers")
    layers = {name: modules[name] for name in names}
    for obstacle in obstacles(model, layers, r).values():
        raise obstacle.error
    refuse_meta(layers)
    return layers


def refuse_meta(layers: dict[str, nn.Module]) -> None:
    """Raises ValueError if a weight is not loaded."""
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device; expected a loaded model")


__all__ = [
    "ALL_LINEAR",
    "Selection",
    "find_layers",
    "find_targets",
    "refuse_meta",
    "select_layers",
]
