"""The command line: `lorasb <command>`; each command is a module of this folder."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from lorasb_kernels.train.errors import InputError

COMMANDS = {
    "train": "fine-tune a model with LoRA-SB, LoRA variants, peft's adapters or in full",
    "evaluate": "evaluate a trained run on any number of test sets",
    "chat": "talk to a trained run, or to a model with an adapter",
    "init": "initialize the adapters of a run, or predict what that takes",
    "demo": "fine-tune SmolLM2-135M on headlines, in minutes on a CPU",
    "compare": "train several methods on one task and tabulate the results",
    "demo-compare": "compare methods on a small encoder, over seeds and learning rates",
    "config": "write a commented settings file, with a preset filled in",
    "describe": "show what an adapter costs, before or after training",
    "explain": "show which backend, route and tiles a layer would run with",
    "tune": "measure the routes of the frozen product on this GPU and save them",
    "profile": "show what adapted layers cost on this GPU, or predict it for another",
    "plan": "predict whether a model fits on a GPU, and the hours of an epoch",
    "merge": "merge an adapter into its base model and save a plain model",
    "version": "show the versions of the library and of its dependencies",
}

# Loggers of packages that peft and transformers import; what they warn of is not the user's.
NOISY = ("torchao", "torch.utils._pytree")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported."""
    parser = argparse.ArgumentParser(prog="lorasb", description="Fine-tuning with LoRA-SB.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"lorasb_kernels.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for input that cannot be used, 1 for a loss or
    a gradient that is not finite."""
    options = build_parser().parse_args(arguments)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("lorasb_kernels"):
            raise
        print(f"lorasb: {error}; expected `pip install lorasb_kernels[train]`", file=sys.stderr)
    except InputError as error:
        print(f"lorasb: {error}", file=sys.stderr)
    except ArithmeticError as error:  # training or estimation that is no longer finite
        print(f"lorasb: {error}", file=sys.stderr)
        return 1
    return 2


if __name__ == "__main__":
    sys.exit(main())
