"""Finds the linear layers that a configuration selects, and refuses what cannot be adapted.

Only reads the model; nothing is changed.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.ops.precision import FLOAT_DTYPES
from lorasb_kernels.quantization import check_quantized, quantization_of


def matches_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether `name` is one of `suffixes` or ends with `.` and one of them."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of `model` by name, in module order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }


def refuse_adapted(model: nn.Module) -> None:
    """Raises ValueError if `model` holds an adapter."""
    already = next(iter(adapted_layers(model)), None)
    if already is not None:
        raise ValueError(f"the model is adapted already ({already}); expected a plain model")


def find_saved_modules(model: nn.Module, suffixes: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` selects; each suffix must match.

    Raises:
        ValueError: a suffix that matches nothing.
    """
    saved = {name: m for name, m in model.named_modules() if matches_suffix(name, suffixes)}
    for suffix in suffixes:
        if not any(matches_suffix(name, (suffix,)) for name in saved):
            raise ValueError(f"modules_to_save: {suffix!r} matches no module of the model")
    return saved


def _is_linear_like(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def head_modules(model: nn.Module) -> set[int]:
    """Modules outside the base model (language model and classification heads), by identity."""
    heads = set()
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        heads.add(id(get_output_embeddings()))
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = {id(module) for module in body.modules()}
        heads |= {id(module) for module in model.modules() if id(module) not in inside}
    return heads


def find_targets(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    modules_to_save: tuple[str, ...] = (),
) -> dict[str, nn.Linear]:
    """The layers to adapt by name, in module order.

    Args:
        model: any module; meta tensors are fine.
        target_modules: as in `LoRASBConfig`.
        modules_to_save: modules trained whole; nothing inside them is a target.

    Raises:
        ValueError: nothing matched, or a suffix that matches nothing.
        TypeError: a matched layer of a kind that cannot be adapted.
    """
    candidates = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_linear_like(module)
        and not any(matches_suffix(name[:end], modules_to_save) for end in _prefix_ends(name))
    }
    if target_modules == "all-linear":
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
    for name, module in targets.items():
        _check_kind(name, module)
    return targets


def find_layers(
    model: nn.Module, names: Sequence[str], modules_to_save: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """The layers of exactly these names, as a saved adapter lists them.

    Args:
        model: a model without adapters.
        names: full names.
        modules_to_save: as in `LoRASBConfig`.

    Raises:
        ValueError: no names, or one that is no linear layer or inside a module trained whole.
        TypeError: a layer of a kind that cannot be adapted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if not _is_linear_like(modules.get(name))]
    if missing or not names:
        raise ValueError(
            f"{len(missing)} of the adapter's {len(names)} layers are no linear layers of the "
            f"model (such as {str(missing[:1])[:200]}); expected the base model it was made for"
        )
    for name in names:
        if any(matches_suffix(name[:end], modules_to_save) for end in _prefix_ends(name)):
            raise ValueError(f"{name} is in modules_to_save and among the adapted layers")
        _check_kind(name, modules[name])
    return {name: modules[name] for name in names}


def _prefix_ends(name: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\.", name)] + [len(name)]


def _nothing_matched(target_modules, candidates: dict[str, nn.Module]) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in candidates})
    return (
        f"target_modules {target_modules!r} matched no linear layer; "
        f"the model's linear layers end in {suffixes}"
    )


def _check_kind(name: str, module: nn.Module) -> None:
    if type(module).__name__ == "Conv1D":
        raise TypeError(
            f"{name} is a transformers Conv1D, whose weight is transposed; expected an nn.Linear "
            "(GPT-2 is not supported)"
        )
    if isinstance(module, AdaptedLinear):
        raise ValueError(f"{name} is adapted already; expected a model without adapters")
    if quantization_of(module) is not None:
        check_quantized(name, cast(nn.Linear, module))
        return
    if type(module) is not nn.Linear:
        raise TypeError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}; "
            "expected a plain nn.Linear"
        )
    weight = module.weight
    if hasattr(module, "parametrizations"):
        raise TypeError(f"{name} is parametrized; expected a plain weight")
    if weight.dtype not in FLOAT_DTYPES or type(weight.data) is not torch.Tensor:
        raise TypeError(
            f"{name}.weight is a {type(weight.data).__name__} of {weight.dtype}; expected a "
            "float16, bfloat16 or float32 tensor, or one that bitsandbytes or torchao quantized"
        )


def check_adaptable(model: nn.Module, targets: dict[str, nn.Linear], r: int) -> None:
    """Refuses layers that cannot take a rank-r adapter without affecting something else.

    Raises:
        ValueError: meta or shared weights, hooks, or r > min(m, n).
    """
    users = Counter(
        _storage(tensor)
        for _, module in model.named_modules(remove_duplicate=False)
        for tensor in module._parameters.values()
        if tensor is not None and not tensor.is_meta
    )
    for name, linear in targets.items():
        weight = linear.weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device; expected a loaded model")
        if users[_storage(weight)] > 1:
            raise ValueError(
                f"{name}.weight is shared with another module (tied weights); adapting it would "
                "change both. Leave it out of target_modules"
            )
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
            raise ValueError(f"{name} has hooks, which would be lost; expected them added later")
        check_rank(name, linear, r)


def _storage(tensor: torch.Tensor) -> int:
    """Identifies the memory of a tensor; torchao's tensors have no address."""
    return tensor.data_ptr() or id(tensor)


def check_rank(name: str, linear: nn.Linear, r: int) -> None:
    """Raises ValueError unless r ≤ min(m, n)."""
    limit = min(linear.in_features, linear.out_features)
    if r > limit:
        raise ValueError(f"r is {r}; expected r <= {limit} for {name}, which is {linear}")


def config_of(model: nn.Module) -> LoRASBConfig:
    """The configuration that `adapt` left in `model`."""
    return cast(LoRASBConfig, model.lorasb_config)


def layers_of(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model that `adapt` returned; ValueError for a plain model."""
    layers = adapted_layers(model)
    if not layers or not hasattr(model, "lorasb_config"):
        raise ValueError("the model holds no adapter; expected a model that adapt() returned")
    return layers


__all__ = [
    "adapted_layers",
    "check_adaptable",
    "check_rank",
    "config_of",
    "find_layers",
    "find_saved_modules",
    "find_targets",
    "head_modules",
    "layers_of",
    "refuse_adapted",
]
