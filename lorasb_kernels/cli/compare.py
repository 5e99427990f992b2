r"""Compare methods on one task, from the same base, seeds and data order.

Without --config the task is the demonstration's: MiniLM-L6 learns to tell sarcastic headlines from
others. There the suite `methods` compares full fine-tuning, LoRA, rsLoRA, PiSSA, DoRA, LoRA-GA,
LoRA-Pro, VeRA, LoRA-XS, LoRA-SB and LoRA-One, and `ablations` compares LoRA-SB with other
initializations and other numbers of samples. Learning rates are chosen on validation rows (up to
two more are tried if the best is the first or the last), and the test rows are read once per run.
Every finished run is kept, so an interrupted comparison resumes. Writes table.json, table.md and
loss.png.

    lorasb compare --suite methods --output-dir out/compare
    lorasb compare --config task.yaml --validation val.jsonl --test test.jsonl \
        --methods lora-sb:16:1e-3,2.5e-3 lora:16:4e-4,1e-3 --output-dir out/compare
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task, the contenders, where to write."""
    parser.add_argument("--output-dir", default="out/compare", help="default out/compare")
    parser.add_argument("--suite", choices=("methods", "ablations"), default="methods")
    parser.add_argument("--only", nargs="+", default=[], help="contenders, such as lora-sb-r8")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … N−1; default 3")
    parser.add_argument("--train-rows", type=int, default=2000, help="of headlines; default 2000")
    parser.add_argument("--test-rows", type=int, default=2000, help="of headlines; default 2000")
    parser.add_argument("--epochs", type=float, default=3, help="over headlines; default 3")
    parser.add_argument("--config", help="settings of `lorasb train`, for a task of your own")
    parser.add_argument("--validation", help="with --config: rows that choose the learning rate")
    parser.add_argument("--test", help="with --config: rows of the final evaluation")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD:R:RATE[,RATE…]",
        help="with --config: the contenders",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the comparison and prints its table."""
    from transformers.utils import logging

    from lorasb_kernels.train.comparison import Comparison
    from lorasb_kernels.train.demo.compare import ETA, EXTENSIONS, SUITES, headlines_task
    from lorasb_kernels.train.progress import console

    if options.seeds < 1:
        raise ConfigError(f"seeds is {options.seeds}; expected at least 1")
    logging.disable_progress_bar()
    if options.config:
        task, contenders = own_task(options), [contender(text) for text in options.methods]
    else:
        task = headlines_task(options.train_rows, options.test_rows, options.epochs, ETA)
        contenders = SUITES[options.suite]
    comparison = Comparison(task, Path(options.output_dir), range(options.seeds), EXTENSIONS)
    rows = comparison.run(contenders, options.only)
    console.print(comparison.summary(rows))
    return 0


def own_task(options: argparse.Namespace):
    """The task of --config, --validation and --test.

    Raises:
        ConfigError: a flag is missing.
    """
    from lorasb_kernels.train.comparison import Task
    from lorasb_kernels.train.config import load_file, load_preset, resolve
    from lorasb_kernels.train.run import read_held_out, read_training

    for name in ("validation", "test", "methods"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing; --config expects it")
    settings = load_file(options.config)
    if "preset" in settings:
        settings = load_preset(settings.pop("preset")) | settings
    config = resolve(settings | {"output_dir": options.output_dir})
    train = read_training(config)
    validation, test = (read_held_out(config, s) for s in (options.validation, options.test))
    # The settings as given: defaults that depend on the method are filled in per contender.
    title = Path(config.data).stem
    return Task(title, settings, train, validation, test, config.evaluation)


def contender(text: str):
    """The contender that `METHOD:R:RATE[,RATE…]` describes.

    Raises:
        ConfigError: text of another form.
    """
    from lorasb_kernels.train.comparison import Contender

    try:
        method, r, rates = text.split(":")
        return Contender(method, int(r), tuple(sorted(map(float, rates.split(",")))))
    except ValueError as error:
        raise ConfigError(f"--methods has {text!r}; expected METHOD:R:RATE[,RATE…]") from error
