r"""Compare methods on one task, from the same base, seeds and data order.

Without --config the task is the demonstration's: MiniLM-L6 learns to tell sarcastic headlines from
others. There the suite `methods` compares full fine-tuning, LoRA, rsLoRA, PiSSA, DoRA, LoRA-GA,
LoRA-Pro, VeRA, LoRA-XS, LoRA-SB and LoRA-One, and `ablations` compares LoRA-SB with other
initializations and other numbers of samples. Learning rates are chosen on validation rows (up to
two more are tried if the best is the first or the last), and the test rows are read once per run.
Every finished run is kept, so an interrupted comparison resumes. Writes table.json, table.md and
loss.png.

    lorasb compare --suite methods --output-dir out/compare
    lorasb compare --config task.yaml --validation val.jsonl --test test.jsonl other.jsonl \
        --methods lora-sb:16:1e-3,2.5e-3 lora:16:4e-4,1e-3 --output-dir out/compare

Instead of --methods, the file may list `contenders`, each with `method`, `r`, `learning_rate` (one
or a list; none: the task's), `label` and any other settings of its own. --preset lies below the
file, --model and --data above it. --validation is needed only to choose among
learning rates. The score of a run is its average over the test sets.
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.settings_file import preset_names
from lorasb_kernels.utils.fields import shown


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
    parser.add_argument("--preset", choices=preset_names(), help="with --config: settings below it")
    parser.add_argument("--model", help="with --config: in place of its model")
    parser.add_argument("--data", help="with --config: in place of its data")
    parser.add_argument("--validation", help="with --config: rows that choose the learning rate")
    parser.add_argument("--test", nargs="+", help="with --config: sets of the final evaluation")
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
        task, contenders = own_task(options)
    else:
        task = headlines_task(options.train_rows, options.test_rows, options.epochs, ETA)
        contenders = SUITES[options.suite]
    comparison = Comparison(task, Path(options.output_dir), range(options.seeds), EXTENSIONS)
    rows = comparison.run(contenders, options.only)
    console.print(comparison.summary(rows))
    return 0


def own_task(options: argparse.Namespace):
    """The task and the contenders of --config and its flags.

    Raises:
        ConfigError: a flag is missing, or a contender cannot be used.
    """
    from lorasb_kernels.train.comparison import Task
    from lorasb_kernels.train.data import metric_of
    from lorasb_kernels.train.run import read_held_out, read_training
    from lorasb_kernels.train.settings_file import resolve

    settings, contenders = listed(options)
    if not options.test:
        raise ConfigError("--test is missing; --config expects it")
    if not options.validation and any(len(one.learning_rates) > 1 for one in contenders):
        raise ConfigError("--validation is missing; a choice of learning rates expects it")
    config = resolve(settings | {"output_dir": options.output_dir})
    train = read_training(config)
    validation = read_held_out(config, options.validation) if options.validation else ()
    test = {source: read_held_out(config, source) for source in options.test}
    metrics = {}
    if config.task == "causal-lm" and len(test) > 1:
        metrics = {source: metric for source in test if (metric := metric_of(source))}
    # The settings as given: defaults that depend on the method are filled in per contender.
    title = Path(config.data).stem
    task = Task(title, settings, train, validation, test, config.evaluation, metrics)
    return task, contenders


def listed(options: argparse.Namespace):
    """The settings that all contenders of --config have in common, and the contenders.

    Raises:
        ConfigError: unusable settings, or no contender.
    """
    from lorasb_kernels.train.settings_file import load_file, load_preset

    settings = load_file(options.config, also=("contenders",))
    entries = settings.pop("contenders", None) or ()
    preset = options.preset or settings.pop("preset", None)
    if preset is not None:
        settings = load_preset(preset) | {k: v for k, v in settings.items() if k != "preset"}
    settings |= {n: v for n in ("model", "data") if (v := getattr(options, n)) is not None}
    contenders = [listed_contender(entry, settings.get("learning_rate")) for entry in entries]
    contenders += [contender(text) for text in options.methods]
    if not contenders:
        raise ConfigError("--methods is missing; --config expects it, or a list of contenders")
    return settings, contenders


def listed_contender(entry: object, learning_rate: float | None = None):
    """The contender that an entry of `contenders` describes.

    Args:
        entry: from the file.
        learning_rate: where the entry has none.

    Raises:
        ConfigError: no mapping, unknown keys, no method, rank or learning rate.
    """
    from lorasb_kernels.train.comparison import Contender
    from lorasb_kernels.train.settings_file import check_keys

    if not isinstance(entry, dict):
        raise ConfigError(f"contenders hold {shown(entry)}; expected mappings of settings")
    check_keys(entry, "contenders", also=("label",))
    entry = {"learning_rate": learning_rate} | entry
    try:
        method, r, rates = (entry.pop(name) for name in ("method", "r", "learning_rate"))
        rates = rates if isinstance(rates, list) else [rates]
        label = entry.pop("label", "")
        return Contender(method, r, tuple(sorted(map(float, rates))), entry, label)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"contenders hold {shown(entry)}: {error}; expected method, r and learning_rate"
        ) from error


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
