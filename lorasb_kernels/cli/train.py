r"""Fine-tune a model.

Settings come from a preset, then a YAML or JSON file, then flags, later ones first. With
several methods each trains in its own folder under output_dir, and one plot compares them.
An interrupted run resumes from its newest checkpoint when it is started again.

    lorasb train --preset arithmetic --model <folder or hub id> --data train.jsonl \
        --eval-data test.jsonl --output-dir out/run
"""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from lorasb_kernels.train.config import METHODS, TrainConfig, fields
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.settings_file import load_file, preset_names, resolve
from lorasb_kernels.utils.fields import shown

MANY = {"method", "target_modules", "report_to", "stop"}  # flags that take several values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting, and the file and preset that they override."""
    parser.usage = f"{parser.prog} [--config FILE] [--preset NAME] [settings …]"
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of settings")
    presets = f"the papers' hyperparameters: {', '.join(preset_names())}"
    parser.add_argument("--preset", metavar="NAME", help=presets)
    sections: dict[str, argparse._ArgumentGroup] = {}
    for name, field in fields().items():
        title = field.metadata["section"]
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        kinds = set(typing.get_args(field.type)) or {field.type}
        if bool in kinds:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": next((kind for kind in (int, float) if kind in kinds), str)}
            options |= {"nargs": "+"} if name in MANY else {}
            options |= {"metavar": "X", "choices": field.metadata["choices"] or None}
        sections[title].add_argument(
            f"--{name.replace('_', '-')}",
            default=None,
            help=describe(field).replace("%", "%%"),
            **options,
        )


def describe(field: dataclasses.Field) -> str:
    """A setting in words: what it is, which values it takes, its default."""
    about = field.metadata
    parts = [about["description"]]
    if about["choices"]:
        parts.append("one of " + ", ".join(about["choices"]))
    if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
        parts.append(f"default {field.default}")
    return "; ".join(parts)


def given_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags; a single target is a pattern."""
    given = {n: v for n in fields() if (v := getattr(options, n)) is not None}
    for name in ("method", "target_modules"):
        if name in given and len(given[name]) == 1:
            given[name] = given[name][0]
    if options.preset:
        given["preset"] = options.preset
    return given


def configs_of(settings: dict[str, Any]) -> list[TrainConfig]:
    """The runs that the settings ask for: one, or one for each of a list of methods.

    Raises:
        ConfigError: settings that cannot be used.
    """
    methods = settings.get("method", "lora-sb")
    if not isinstance(methods, (list, tuple)):
        return [resolve(settings)]
    if not methods or not all(isinstance(method, str) for method in methods):
        raise ConfigError(f"method is {shown(methods)}; expected at least one of {METHODS}")
    if len(set(methods)) < len(methods):
        raise ConfigError(f"method is {shown(methods)}; expected each of them once")
    first = resolve(settings, {"method": methods[0]})  # names what is missing
    folder = Path(first.output_dir)
    return [
        resolve(settings, {"method": method, "output_dir": str(folder / method)})
        for method in methods
    ]


def run(options: argparse.Namespace) -> int:
    """Trains each method in turn and reports."""
    settings = (load_file(options.config) if options.config else {}) | given_flags(options)
    configs = configs_of(settings)

    from transformers.utils import logging

    from lorasb_kernels.train.progress import console
    from lorasb_kernels.train.run import finetune, is_main_process, read_held_out, read_training
    from lorasb_kernels.train.summary import Curve, loss_figure, runs_table
    from lorasb_kernels.utils.figures import save_png

    logging.disable_progress_bar()
    train_rows = read_training(configs[0])
    eval_rows = read_held_out(configs[0], configs[0].eval_data) if configs[0].eval_data else ()
    results = [finetune(config, train_rows, eval_rows)[2] for config in configs]
    if is_main_process():
        folder = Path(configs[0].output_dir)
        plot = (folder if len(configs) == 1 else folder.parent) / "loss.png"
        curves = [
            Curve(config.method, None if config.method == "full" else config.r, result.losses)
            for config, result in zip(configs, results, strict=True)
        ]
        save_png(loss_figure(curves, Path(configs[0].model).name), plot)
        console.print(runs_table(results))
        console.print(f"loss curve: {plot}")
    return 0
