"""LoRA-SB as a method of peft: `get_peft_model(model, LoRASBPeftConfig(...))`.

Importing this module registers the method with peft; also import it before
`PeftModel.from_pretrained`. Saving, loading, named adapters, `disable_adapter()` and
`merge_and_unload()` are peft's own. The layers run this library's fused operation; several active
adapters run as one adapter of the summed rank.

peft 0.21 has no entry points by which an installed package could register itself, so the import
cannot be left out.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import nn

from lorasb_kernels.config import INITS, LoRASBConfig
from lorasb_kernels.functional import FrozenLayer, lorasb_linear
from lorasb_kernels.init.estimation.options import EstimationOptions
from lorasb_kernels.init.methods import initialize, layer_generator, lora_xs, orthogonal
from lorasb_kernels.linear_layers import is_linear, matrix_shape
from lorasb_kernels.nn.masters import masters_kept
from lorasb_kernels.nn.merging import delta_weight, merged_weight
from lorasb_kernels.quantization import (
    check_quantized,
    dense_weight,
    prevent_repacking,
    quantization_of,
    weight_dtype,
)
from lorasb_kernels.targets.obstacles import obstacles

METHOD = "lorasb"
DEFAULTS = EstimationOptions()
PEFT_INITS = ("lora-sb", "lora-xs", "orthogonal")
OWN_FIELDS = (
    "r",
    "init",
    "scaling",
    "lora_alpha",
    "dropout",
    "backend",
    "sigma_side",
    "core_std",
    "seed",
)


@dataclass
class LoRASBPeftConfig(PeftConfig):
    """Configuration of a LoRA-SB or LoRA-XS adapter in peft.

    Fields are those of `LoRASBConfig`; `target_modules` and the fields that select layers are
    peft's. With `init="lora-sb"` the adapter is zero until `initialize_from_gradients` is called,
    because peft's interface takes no batches; training it before is an error.
    """

    r: int = 16
    target_modules: list[str] | str | None = None
    init: str = "lora-sb"
    scaling: float = 1.0
    lora_alpha: float | None = None
    dropout: float = 0.0
    backend: str = "auto"
    sigma_side: str = "B"
    core_std: float = 1e-5
    seed: int = 0
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LORASB
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.init in INITS and self.init not in PEFT_INITS:
            raise ValueError(
                f"init is {self.init!r}; expected 'lora-sb', 'lora-xs' or 'orthogonal'"
            )
        self.own_config()  # raises on a field out of range

    def own_config(self) -> LoRASBConfig:
        """The same settings as a `LoRASBConfig`, validated."""
        return LoRASBConfig(**{name: getattr(self, name) for name in OWN_FIELDS})


class LoRASBLayer(nn.Module, BaseTunerLayer):
    """A linear layer with named adapters `s·B·R·A`; R is trained.

    For each adapter `lorasb_R` holds an fp32 [r, r] parameter, and `lorasb_A` [r, n] and
    `lorasb_B` [m, r] hold buffers in the dtype of the weight.
    """

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "lorasb_config", "lorasb_initialized")

    def __init__(self, base_layer: nn.Linear, name: str):
        super().__init__()
        if quantization_of(base_layer) is not None:
            check_quantized(name, base_layer)
            prevent_repacking(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = matrix_shape(base_layer)
        self.name = name
        self.lorasb_R = nn.ParameterDict()
        self.lorasb_A = BufferDict(persistent=True)
        self.lorasb_B = BufferDict(persistent=True)
        self.lorasb_config: dict[str, LoRASBConfig] = {}
        self.lorasb_initialized: dict[str, bool] = {}  # False: LoRA-SB before its gradients
        self._disable_adapters = False
        self.merged_adapters = []

    @torch.no_grad()
    def add_adapter(self, adapter_name: str, config: LoRASBConfig) -> None:
        """Adds an adapter with its initial factors; nothing is drawn for meta weights."""
        m, n = self.out_features, self.in_features
        if config.r > min(m, n):
            raise ValueError(f"r is {config.r}; expected r <= {min(m, n)} for {self.name}")
        device, dtype = self.base_layer.weight.device, weight_dtype(self)
        if device.type == "meta":
            lora_A, lora_B, lora_R = (
                torch.empty(shape, device="meta")
                for shape in ((config.r, n), (m, config.r), (config.r, config.r))
            )
        else:
            generator, weight = layer_generator(config.seed, self.name), dense_weight(self)
            if config.init == "lora-xs":
                adapter = lora_xs(weight, config.r, config.core_std, config.sigma_side, generator)
            else:
                adapter = orthogonal(weight, config.r, generator)
            lora_A, lora_B, lora_R = adapter.lora_A, adapter.lora_B, adapter.lora_R
        self.lorasb_config[adapter_name] = config
        self.lorasb_initialized[adapter_name] = config.init != "lora-sb"
        self.lorasb_R[adapter_name] = nn.Parameter(
            lora_R.to(device, torch.promote_types(dtype, torch.float32))
        )
        self.lorasb_A[adapter_name] = lora_A.to(device, dtype).contiguous()
        self.lorasb_B[adapter_name] = lora_B.to(device, dtype).contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m].

        Raises:
            ValueError: a LoRA-SB adapter is trained that was never initialized from gradients.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lorasb_R]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        if torch.is_grad_enabled():
            self._refuse_uninitialized(active)
        lora_A, lora_R, lora_B, scaling = self._combined(active)
        config = self.lorasb_config[active[0]]
        options = (scaling, config.dropout, self.training, config.backend)
        base, adapter = self.base_layer, (lora_A, lora_R, lora_B)
        if quantization_of(base) is None:
            return lorasb_linear(x, dense_weight(base), *adapter, base.bias, *options)
        shape = (self.out_features, self.in_features)
        weight = FrozenLayer(shape, base, partial(dense_weight, base))
        return lorasb_linear(x, weight, *adapter, None, *options)

    def _refuse_uninitialized(self, names: list[str]) -> None:
        for name in names:
            if self.lorasb_R[name].requires_grad and not self.lorasb_initialized[name]:
                raise ValueError(
                    f"the LoRA-SB adapter {name!r} has seen no gradients; expected "
                    "initialize_from_gradients(model, batches, learning_rate) before training, or "
                    "init='orthogonal', which needs none"
                )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A loaded adapter is initialized unless its R is still zero."""
        for name, initialized in self.lorasb_initialized.items():
            core = state_dict.get(f"{prefix}lorasb_R.{name}")
            if core is None or initialized:
                continue
            self.lorasb_initialized[name] = bool(core.any())
            if not self.lorasb_initialized[name]:
                warnings.warn(
                    f"the LoRA-SB adapter {name!r} was saved before it saw gradients: it leaves "
                    "the base model as it is",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _combined(self, names: list[str]):
        """A, R, B and s of the sum of adapters: `[B₁ B₂] · diag(s₁R₁, s₂R₂) · [A₁; A₂]`."""
        configs = [self.lorasb_config[name] for name in names]
        if len(names) == 1:
            name = names[0]
            return self.lorasb_A[name], self.lorasb_R[name], self.lorasb_B[name], configs[0].s
        if len({config.dropout for config in configs}) > 1:
            raise ValueError(
                f"the active adapters {names} have dropout {[c.dropout for c in configs]}; "
                "expected one value, as they share their input"
            )
        lora_A = torch.cat([self.lorasb_A[name] for name in names])
        lora_B = torch.cat([self.lorasb_B[name] for name in names], dim=1)
        cores = [c.s * self.lorasb_R[name] for name, c in zip(names, configs, strict=True)]
        return lora_A, torch.block_diag(*cores), lora_B, 1.0

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`s·B·R·A` of an adapter, [m, n], in the dtype of R (fp32)."""
        factors = (self.lorasb_A[adapter], self.lorasb_R[adapter], self.lorasb_B[adapter])
        return delta_weight(*factors, self.lorasb_config[adapter].s)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight, in fp32 with one rounding; refused if it is quantized."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lorasb_R]
        self._shift_weight(names, 1.0, safe_merge)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtracts the merged adapters from the weight again, up to rounding."""
        self._shift_weight(self.merged_adapters, -1.0, False)
        self.merged_adapters.clear()

    @torch.no_grad()
    def _shift_weight(self, names: list[str], sign: float, check: bool) -> None:
        if not names:
            return
        if (kind := quantization_of(self)) is not None:
            raise ValueError(
                f"{self.name} is quantized ({kind}); expected the adapter to be merged into the "
                "model it was quantized from"
            )
        weight = dense_weight(self.base_layer)
        delta = sum(self.get_delta_weight(name) for name in names)
        shifted = merged_weight(weight, sign * delta)
        if check and not shifted.isfinite().all():
            raise ValueError(f"merging {names} into {self.name} would not give finite weights")
        weight.copy_(shifted)

    def _apply(self, fn, recurse=True):
        """Moves R between devices but never below fp32."""
        cores = list(self.lorasb_R.values())
        masters = [*cores, *(core.grad for core in cores)]
        return super()._apply(masters_kept(fn, masters), recurse)


class LoRASBModel(BaseTuner):
    """Puts `LoRASBLayer`s into a model; peft's interface for a method."""

    prefix = f"{METHOD}_"
    tuner_layer_cls = LoRASBLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **_
    ):
        if isinstance(target, LoRASBLayer):
            layer = target
        elif quantization_of(target) is not None or is_linear(target):
            found = obstacles(self.model, {current_key: target}, peft_config.r)
            if found:
                raise found[current_key].error
            layer = LoRASBLayer(target, current_key)
        else:
            raise TypeError(
                f"{current_key} is a {type(target).__name__}; expected an nn.Linear or another "
                "layer that computes the same"
            )
        layer.add_adapter(adapter_name, peft_config.own_config())
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        """Nothing to cast: R is created in fp32, and A and B have the dtype of the weight."""


def initialize_from_gradients(
    model: nn.Module,
    batches: Iterable,
    learning_rate: float,
    adapter_name: str = "default",
    *,
    estimation: EstimationOptions = DEFAULTS,
    progress: bool = True,
) -> None:
    """LoRA-SB's initialization of an adapter: the truncated SVD of `−η·sign(Σ ∂L/∂W)`.

    Args:
        model: a `PeftModel` with a LoRA-SB adapter; other adapters are disabled while this runs.
        batches, learning_rate, estimation, progress: as in `lorasb_kernels.adapt`.
        adapter_name: the adapter to initialize.

    Raises:
        ValueError: the model has no such adapter, and what `estimate_updates` raises.
    """
    layers = {
        f"{name}.base_layer": module
        for name, module in model.named_modules()
        if isinstance(module, LoRASBLayer) and adapter_name in module.lorasb_R
    }
    if not layers:
        raise ValueError(f"the model has no LoRA-SB adapter {adapter_name!r}")
    targets = {name: layer.base_layer for name, layer in layers.items()}
    config = next(iter(layers.values())).lorasb_config[adapter_name]
    config = dataclasses.replace(config, init="lora-sb")
    with model.disable_adapter():
        adapters = dict(
            initialize(model, targets, config, batches, learning_rate, estimation, progress)
        )
    with torch.no_grad():
        for name, adapter in adapters.items():
            layers[name].lorasb_A[adapter_name].copy_(adapter.lora_A)
            layers[name].lorasb_R[adapter_name].copy_(adapter.lora_R)
            layers[name].lorasb_B[adapter_name].copy_(adapter.lora_B)
            layers[name].lorasb_initialized[adapter_name] = True


def _register() -> None:
    """Registers the method by `register_peft_method`, peft's extension point.

    It accepts only names of `PeftType`, an enumeration without a way to extend it, hence the new
    member.
    """
    if METHOD.upper() not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD.upper())
        member._name_ = member._value_ = METHOD.upper()
        PeftType._member_names_.append(METHOD.upper())
        PeftType._member_map_[METHOD.upper()] = member
        PeftType._value2member_map_[METHOD.upper()] = member
        type.__setattr__(PeftType, METHOD.upper(), member)
    if PeftType.LORASB not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=LoRASBPeftConfig, model_cls=LoRASBModel)


_register()

__all__ = ["LoRASBLayer", "LoRASBModel", "LoRASBPeftConfig", "initialize_from_gradients"]
