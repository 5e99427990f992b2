"""Write a commented settings file for `lorasb train`, with what a preset sets filled in.

Settings that are not set are there as comments, with their description and default.

    lorasb config --preset arithmetic > run.yaml
    lorasb train --config run.yaml
"""

import argparse
import textwrap

from lorasb_kernels.cli.train import describe
from lorasb_kernels.train.config import fields
from lorasb_kernels.train.settings_file import load_preset, preset_names

NEEDED = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "train.jsonl"}
END = "...\n"  # follows a YAML document that is a single value
NEEDED |= {"output_dir": "out/run", "eval_data": "test.jsonl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The preset."""
    presets = f"the papers' hyperparameters: {', '.join(preset_names())}"
    parser.add_argument("--preset", metavar="NAME", help=presets)


def run(options: argparse.Namespace) -> int:
    """Prints the file."""
    print(settings_text(load_preset(options.preset) if options.preset else {}), end="")
    return 0


def settings_text(given: dict) -> str:
    """A YAML file of all settings by section; those of `given` are set, others commented out."""
    import yaml

    given = NEEDED | given
    lines, section = [], None
    for name, field in fields().items():
        if field.metadata["section"] != section:
            section = field.metadata["section"]
            lines += ["", f"# --- {section} ---"]
        lines += textwrap.wrap(describe(field), 96, initial_indent="# ", subsequent_indent="#   ")
        value = given.get(name, field.default)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        line = f"{name}: {text.removesuffix(END).strip()}"
        lines.append(line if name in given else f"# {line}")
    return "\n".join(lines[1:]) + "\n"
