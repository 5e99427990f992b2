"""All cores in one flat buffer: an optimizer step updates one tensor, clipping takes one norm.

A model has hundreds of cores of a few thousand elements: AdamW, clipping and `zero_grad` spend
their time on launches. `PackedCores` moves the cores into one fp32 vector, of which each `lora_R`
becomes a view. That vector is the only parameter to give to an optimizer of `torch.optim` that
works element by element:

    packed = PackedCores(model)
    optimizer = torch.optim.AdamW([packed.parameter], lr=1e-4)
    ...
    loss.backward()
    torch.nn.utils.clip_grad_norm_([packed.parameter], 1.0)
    optimizer.step()
    optimizer.zero_grad()
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lorasb_kernels.targets import config_of, layers_of


class PackedCores:
    """The cores of an adapted model as views of one parameter.

    The layers keep their `lora_R` parameters: names, `state_dict`, `save_adapter` and
    `load_adapter` are as before, and gradients appear in `lora_R.grad` and in
    `parameter.grad`, the same memory. Either `optimizer.zero_grad()` or `model.zero_grad()`
    starts a new sum.

    A step leaves a core without a gradient, and its moments, as they are.

    Limits: the optimizer counts steps for all cores in common, also for one that had no gradient
    in some of them; all cores are on one device and stay there (pack after `model.to(device)`);
    a deep copy of the model is a plain model; optimizers that look at whole matrices (Muon,
    Adafactor, LAMB) need the separate cores; and so does `fully_shard`.

    Args:
        model: an adapted model.

    Attributes:
        parameter: fp32 [Σ r²], the cores one after another in module order.

    Raises:
        ValueError: the model holds no adapter or one without cores (LoRA), cores on
            several devices or of several dtypes, or cores that do not require grad.
    """

    def __init__(self, model: nn.Module):
        layers = layers_of(model)
        config = config_of(model)
        if not config.facts.has_core:
            raise ValueError(
                f"the model's init is {config.init!r}, which trains A and B; "
                "expected adapters that train cores"
            )
        self._cores = {n: c for n, layer in layers.items() if (c := layer.lora_R) is not None}
        first = next(iter(self._cores.values()))
        for name, core in self._cores.items():
            if core.device != first.device or core.dtype != first.dtype:
                raise ValueError(
                    f"{name}.lora_R is {core.dtype} on {core.device}; expected {first.dtype} on "
                    f"{first.device}, as the others"
                )
            if not core.requires_grad:
                raise ValueError(f"{name}.lora_R is frozen; expected it to require grad")
        flat = torch.cat([core.detach().reshape(-1) for core in self._cores.values()])
        self.parameter = nn.Parameter(flat)
        self._gradient = torch.zeros_like(flat)
        self._gradient_views = dict(zip(self._cores, self._split(self._gradient), strict=True))
        self._arrived: set[str] = set()  # cores with a gradient in the present sum
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.parameter.packed_cores = self  # type: ignore[attr-defined]  # whoever holds the parameter keeps the hooks at work
        offset = 0
        for (name, core), view in zip(self._cores.items(), self._split(flat), strict=True):
            core.data = view
            core.grad = None
            core.register_hook(_while_alive(self._before_accumulation, name, offset))
            core.register_post_accumulate_grad_hook(_while_alive(self._after_accumulation, name))
            offset += core.nbytes
        for register, method in (
            (register_optimizer_step_pre_hook, self._keep_cores_without_gradient),
            (register_optimizer_step_post_hook, self._restore_cores_without_gradient),
        ):
            weakref.finalize(self, register(_while_alive(method)).remove)

    def _keep_cores_without_gradient(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """An optimizer passes over parameters without a gradient, but not over parts of one."""
        missing = [i for i, name in enumerate(self._cores) if name not in self._arrived]
        held = any(p is self.parameter for group in optimizer.param_groups for p in group["params"])
        if not (held and missing and self._arrived):
            return
        flat = [self.parameter.detach()] + [
            value
            for value in optimizer.state[self.parameter].values()
            if isinstance(value, torch.Tensor) and value.shape == self.parameter.shape
        ]
        parts = [self._split(tensor)[i] for tensor in flat for i in missing]
        self._kept = [(part, part.clone()) for part in parts]

    @torch.no_grad()
    def _restore_cores_without_gradient(self, *_) -> None:
        for part, before in self._kept:
            part.copy_(before)
        self._kept = []

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([core.numel() for core in self._cores.values()])
        return [p.view_as(core) for p, core in zip(parts, self._cores.values(), strict=True)]

    def _before_accumulation(self, name: str, offset: int, _) -> None:
        if self._cores[name].data_ptr() != self.parameter.data_ptr() + offset:
            raise RuntimeError(
                f"{name}.lora_R is no longer a view of the packed cores; expected "
                "PackedCores(model) after the model's last move or cast"
            )
        summing = any(other.grad is not None for other in self._latest_first())
        if self.parameter.grad is None or not summing:
            # After optimizer.zero_grad() or model.zero_grad() a new sum starts.
            self._arrived.clear()
            self._gradient.zero_()

    def _after_accumulation(self, name: str, core: torch.Tensor) -> None:
        view = self._gradient_views[name]
        assert core.grad is not None  # accumulated just now
        if core.grad.data_ptr() != view.data_ptr():
            view.copy_(core.grad)
            core.grad = view
        self.parameter.grad = self._gradient
        self._arrived.add(name)

    def _latest_first(self):
        # Backward runs from the last layer to the first, so this finds a gradient at once.
        return reversed(self._cores.values())

    def separate_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """The optimizer's state dict as if it had been given the separate cores.

        It can be loaded by an optimizer over `[layer.lora_R, …]` in module order.

        Raises:
            ValueError: the optimizer does not hold the packed parameter.
        """
        position, count = self._position(optimizer), len(self._cores)
        packed = optimizer.state_dict()
        state = {}
        for index, values in packed["state"].items():
            if index != position:
                state[index + (count - 1) * (index > position)] = values
                continue
            for i in range(count):
                state[position + i] = {key: self._part(v, i) for key, v in values.items()}
        groups = []
        for group in packed["param_groups"]:
            indices: list[int] = []
            for index in group["params"]:
                first = index + (count - 1) * (index > position)
                indices += range(first, first + (count if index == position else 1))
            groups.append({**group, "params": indices})
        return {"state": state, "param_groups": groups}

    def load_separate_state(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        """Loads the state of an optimizer over the separate cores, the inverse of
        `separate_state`.

        Raises:
            ValueError: the optimizer does not hold the packed parameter, or the cores in
                `state_dict` have taken different numbers of steps.
        """
        position, count = self._position(optimizer), len(self._cores)
        state, parts = {}, []
        for index, values in sorted(state_dict["state"].items()):
            if position <= index < position + count:
                parts.append(values)
            else:
                state[index - (count - 1) * (index > position)] = values
        if parts and len(parts) != count:
            raise ValueError(f"state_dict has state for {len(parts)} cores; expected {count}")
        if parts:
            state[position] = {key: self._joined(key, parts) for key in parts[0]}
        groups = []
        for group in state_dict["param_groups"]:
            kept = [i for i in group["params"] if not position < i < position + count]
            indices = [i - (count - 1) * (i > position) for i in kept]
            groups.append({**group, "params": indices})
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _position(self, optimizer: torch.optim.Optimizer) -> int:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(held):
            if parameter is self.parameter:
                return index
        raise ValueError("the optimizer does not hold packed.parameter; expected it among its own")

    def _part(self, value, index: int):
        if isinstance(value, torch.Tensor) and value.shape == self.parameter.shape:
            return self._split(value)[index].clone()
        return value.clone() if isinstance(value, torch.Tensor) else value

    def _joined(self, key: str, parts: list[dict]):
        values = [part[key] for part in parts]
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() == 2:
            return torch.cat([value.reshape(-1) for value in values])
        if any(value != first for value in values):
            raise ValueError(f"state_dict has different {key!r} for the cores; expected one")
        return first


def _while_alive(method: Callable[..., None], *arguments) -> Callable[..., None]:
    """A hook that calls `method` without keeping its object, and the model with it, alive."""
    reference = weakref.WeakMethod(method)

    def hook(*given):
        if (alive := reference()) is not None:
            alive(*arguments, *given)

    return hook


__all__ = ["PackedCores"]
