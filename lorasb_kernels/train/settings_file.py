"""Settings in layers: a preset, a YAML or JSON file, flags."""

import dataclasses
import difflib
import importlib.resources
import re
from pathlib import Path
from typing import Any

from lorasb_kernels.train.config import TrainConfig, fields
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.utils.fields import shown

MAX_FILE_BYTES = 1 << 20
# What peft and transformers call these settings.
OTHER_NAMES = {
    "lora_dropout": "dropout",
    "lora_r": "r",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length",
    "model_name_or_path": "model",
}


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = importlib.resources.files(__package__) / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset, on top of those of the preset that it names itself.

    Raises:
        ConfigError: no such preset.
    """
    if name not in preset_names():
        raise ConfigError(f"preset is {shown(name)}; expected one of {', '.join(preset_names())}")
    file = importlib.resources.files(__package__) / "presets" / f"{name}.yaml"
    settings = _parse(file.read_text(encoding="utf-8"), f"preset {name}")
    base = settings.pop("preset", None)
    return settings if base is None else load_preset(base) | settings


def load_file(path: str | Path, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of a YAML or JSON file.

    Args:
        path: the file.
        also: keys it may have that are no settings.

    Raises:
        ConfigError: unreadable, not a mapping, or a key that is not a setting.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(
                f"config is {str(path)!r} of {size} bytes; expected at most {MAX_FILE_BYTES}"
            )
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config is {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config is {str(path)!r}, which is not UTF-8: {error}") from error
    return _parse(text, str(path), also)


def _parse(text: str, source: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    import yaml  # JSON is YAML too

    try:
        settings = yaml.load(text, Loader=_loader())
    except Exception as error:  # YAML's constructors raise whatever int(), datetime() … raise
        raise ConfigError(f"{source} is neither YAML nor JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} holds {type(settings).__name__}; expected a mapping")
    check_keys(settings, source, also)
    return settings


def _loader():
    """YAML's safe loader, which also reads `1e-4` as a number (YAML 1.1 requires `1.0e-4`)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def check_keys(settings: dict[str, Any], source: str, also: tuple[str, ...] = ()) -> None:
    """Refuses keys that are not settings.

    Raises:
        ConfigError: names the unknown keys and the known ones.
    """
    known = {*fields(), "preset", *also}
    unknown = sorted(shown(key).strip("'") for key in set(settings) - known)[:5]
    if unknown:
        near = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
        near |= {name: [OTHER_NAMES[name]] for name in unknown if name in OTHER_NAMES}
        meant = [f"{name} ({found[0]}?)" if found else name for name, found in near.items()]
        raise ConfigError(
            f"{source}: unknown {', '.join(meant)}; expected some of {', '.join(sorted(known))}"
        )


def resolve(*layers: dict[str, Any]) -> TrainConfig:
    """A configuration from layers of settings: later ones override, a `preset` comes first.

    Raises:
        ConfigError: an unknown key, a missing or unusable setting.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        check_keys(layer, "settings")
        merged |= layer
    preset = merged.pop("preset", None)
    if preset is not None:
        merged = load_preset(preset) | merged
    required = [name for name, field in fields().items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in merged]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}")
    return TrainConfig(**merged)
