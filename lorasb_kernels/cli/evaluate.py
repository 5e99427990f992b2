r"""Evaluate a finished run on any number of test sets, and average.

The metric of a set is --evaluation, else the one its form implies (GSM8K: numeric, MATH: math,
Commonsense: answer), else that of the run. Evaluation settings replace the run's for this command
only. The results go to evaluation.json in the run's folder, beside earlier ones.

    lorasb evaluate --run out/run --data gsm8k_test.jsonl MATH_test.jsonl
    lorasb evaluate --run out/run --data boolq/test.json piqa/test.json --evaluation choice
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.config import EVALUATIONS

SETTINGS = ("eval_batch_size", "max_new_tokens", "response_prefix", "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the test sets, the evaluation's settings."""
    every = [metric for metrics in EVALUATIONS.values() for metric in metrics]
    parser.add_argument("--run", required=True, dest="folder", help="output folder of a run")
    parser.add_argument("--data", required=True, nargs="+", help="test sets")
    parser.add_argument("--evaluation", choices=every, help="metric of all sets")
    parser.add_argument("--eval-batch-size", type=int, help="samples per forward pass")
    parser.add_argument("--max-new-tokens", type=int, help="length of a generated answer")
    parser.add_argument("--response-prefix", help="first words of a generated answer")
    parser.add_argument("--stop", nargs="*", help="texts that end a generated answer")


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from transformers.utils import logging

    from lorasb_kernels.train.data import metric_of
    from lorasb_kernels.train.errors import ConfigError
    from lorasb_kernels.train.progress import console
    from lorasb_kernels.train.run import judged, read_held_out
    from lorasb_kernels.train.summary import evaluation_table
    from lorasb_kernels.train.trained import load_trained, read_config
    from lorasb_kernels.utils.files import read_json, write_json

    logging.disable_progress_bar()
    changes = {n: v for n in SETTINGS if (v := getattr(options, n)) is not None}
    config = read_config(Path(options.folder), **changes)
    if options.evaluation and options.evaluation not in EVALUATIONS[config.task]:
        raise ConfigError(
            f"--evaluation is {options.evaluation!r}; expected one of "
            f"{', '.join(EVALUATIONS[config.task])}, as the run's task is {config.task}"
        )
    sets = {source: read_held_out(config, source) for source in options.data}
    metrics = {
        source: options.evaluation
        or (metric_of(source) if config.task == "causal-lm" else None)
        or config.evaluation
        for source in sets
    }
    model, encoder = load_trained(config)
    found = []
    for source, rows in sets.items():
        metric = metrics[source]
        value = judged(model, encoder, config, rows, source, metric)
        found.append({"data": source, "metric": metric, "rows": len(rows), "value": value})
    path = Path(options.folder) / "evaluation.json"
    earlier = read_json(path) if path.exists() else []
    again = {(one["data"], one["metric"]) for one in found}
    kept = [one for one in earlier if (one["data"], one["metric"]) not in again]
    write_json(path, kept + found)
    console.print(evaluation_table(found))
    return 0
