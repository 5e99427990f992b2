"""Reading `adapter_config.json`: every setting of peft's `LoraConfig` is understood or refused.

A setting that changes what an adapter computes, and that this library does not compute, would give
another model in silence. So a setting passes only if it is listed here (all of peft 0.21 are), or
if it is unknown and says nothing (null, false or empty), as the new ones of later versions do.
"""

import re
from pathlib import Path

from lorasb_kernels.utils.files import read_json

# Names of layers are read off the tensors; the rest says where the adapter came from, how it was
# initialized (`init_lora_weights` says by what) or how peft runs it. `fan_in_fan_out` follows from
# the kind of a layer, and peft corrects it where it does not.
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "r", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "lora_alpha", "use_rslora", "lora_dropout", "modules_to_save"),
        "init_lora_weights",
    )
)
_MUST_BE = {
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "ensure_weight_tying": False,
    "megatron_config": None,
    "trainable_token_indices": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
KNOWN = _WITHOUT_EFFECT | _READ | _MUST_BE.keys()

# Initializations of A and B that leave the base model as it is.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Those that take A·B out of the base weights: the adapter fits only what they left of them.
_CHANGED_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga")


def read_settings(path: Path) -> dict:
    """The settings in `adapter_config.json`, once all of them are understood.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of adapter than LoRA, a LoRA variant, or an initialization that
            changed the base model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a folder that peft saved")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; expected peft's settings")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; expected 'LORA'")
    for name, value in settings.items():
        expected = _MUST_BE.get(name)
        if name in _WITHOUT_EFFECT | _READ or not value or value == expected:
            continue
        raise ValueError(
            f"{path}: {name[:100]} is {repr(value)[:100]}; expected {expected!r}: it changes what "
            "the adapter computes in a way that has no counterpart here"
        )
    _check_init(path, settings.get("init_lora_weights", True))
    alpha, saved = settings.get("lora_alpha"), settings.get("modules_to_save") or []
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{path}: lora_alpha is {alpha!r}; expected a number")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: modules_to_save is {saved!r}; expected names of modules")
    return settings


def _check_init(path: Path, init) -> None:
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, (bool, str)) and name in _PLAIN_INITS:
        return
    if isinstance(name, str) and _CHANGED_BASE.fullmatch(name):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changed the base model that A and B "
            "belong to. peft converts such an adapter to LoRA for the original base with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), FOLDER being "
            "the adapter saved before training; expected one converted so"
        )
    if name == "loftq":
        raise ValueError(
            f"{path}: init_lora_weights is 'loftq', which replaced the base weights by quantized "
            "ones that the adapter corrects; expected an adapter of an unchanged base"
        )
    raise ValueError(
        f"{path}: init_lora_weights is {repr(init)[:100]}; expected one of {_PLAIN_INITS}"
    )


__all__ = ["KNOWN", "read_settings"]
