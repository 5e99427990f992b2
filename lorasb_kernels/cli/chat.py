"""Talk to a trained run, or to any model with or without an adapter.

A run is asked with the prompt it was trained with. An empty line or the end of the input ends the
conversation; with --prompt there is one question and one answer.

    lorasb chat --run out/run
    lorasb chat --model <folder or hub id> --adapter <folder or hub id> --prompt "Why is it so?"
"""

import argparse
import sys
from pathlib import Path

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to talk to, and how it answers."""
    parser.add_argument("--run", dest="folder", metavar="FOLDER", help="output folder of a run")
    parser.add_argument("--model", help="folder or hub id of a model")
    parser.add_argument("--adapter", help="folder or hub id of its adapter, ours or peft's")
    parser.add_argument("--system-prompt", help="stands before the conversation; not with --run")
    parser.add_argument("--prompt", help="one question; unset: a conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer; default 256")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="default 0: the likeliest token, always"
    )


def run(options: argparse.Namespace) -> int:
    """Answers until there is nothing asked."""
    given = (options.model, options.adapter, options.system_prompt)
    if (options.folder is None) == (options.model is None) or (options.folder and any(given)):
        raise InputError("expected either --run, or --model with --adapter and --system-prompt")
    for name, least in (("max_new_tokens", 1), ("temperature", 0)):
        if not getattr(options, name) >= least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(options, name)}; expected at least {least}")

    from transformers.utils import logging

    from lorasb_kernels.train.chat import Talk, load
    from lorasb_kernels.train.trained import load_trained, read_config

    logging.disable_progress_bar()
    if options.folder is not None:
        config = read_config(Path(options.folder))
        if config.task != "causal-lm":
            raise InputError(f"--run is of task {config.task!r}; expected 'causal-lm'")
        model, encoder = load_trained(config)
    else:
        model, encoder = load(*given)
    sampling = {"do_sample": True, "temperature": options.temperature}
    talk = Talk(
        model,
        encoder,
        max_new_tokens=options.max_new_tokens,
        **(sampling if options.temperature else {"do_sample": False}),
    )
    if options.prompt is not None:
        talk.ask(options.prompt)
        return 0
    while question := _read():
        talk.ask(question)
    return 0


def _read() -> str:
    """A line from the standard input; empty at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
