"""Predicted hours of the commands of docs/reproduce.md on one GPU, by the performance model.

    python -m bench.hours [--gpu a6000] [--write]

Lengths of rows are assumed, see `TRAINING` and `TESTS`; numbers of rows are those of the data as
distributed. Every adapter is counted as LoRA-SB's of its rank on all linear layers; weights in fp32
take as many times longer as the datasheet's rate is lower than in 16 bits.
"""

import argparse
import dataclasses
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasb_kernels.cli.compare import listed
from lorasb_kernels.cli.main import build_parser
from lorasb_kernels.cli.train import configs_of, given_flags
from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import Gpu, find_gpu
from lorasb_kernels.profiling.block_time import training_tokens_per_second
from lorasb_kernels.profiling.shapes import PRESETS, Preset, gated
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.evaluation import WRITTEN
from lorasb_kernels.utils.files import write_text
from lorasb_kernels.utils.tables import markdown_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
START, END = "<!-- python -m bench.hours --write -->\n", "<!-- end -->\n"

# A classifier's head is small; Llama 3's blocks have Mistral's shapes.
MODELS = {
    "mistralai/Mistral-7B-v0.1": PRESETS["mistral-7b"],
    "google/gemma-2-9b": PRESETS["gemma-2-9b"],
    "meta-llama/Llama-3.2-3B": PRESETS["llama-3.2-3b"],
    "meta-llama/Meta-Llama-3-8B": dataclasses.replace(PRESETS["mistral-7b"], vocabulary=128256),
    "meta-llama/Llama-2-7b-hf": Preset("", gated(4096, 11008, 4096, 4096), 32, 32000),
    "FacebookAI/roberta-large": dataclasses.replace(PRESETS["roberta-large"], vocabulary=1024),
}
# The page names the other tasks of a command in words.
SAME_FOR = {
    "out/sb-cola": ("rte", "mrpc", "sst2", "qnli"),
    "out/xs-cola": ("sst2", "qnli"),
    "out/xs-rte": ("mrpc", "stsb"),
}


@dataclass(frozen=True)
class Rows:
    """A data set: its number of rows, and the tokens of one with its prompt and padding.

    The tokens are assumed: nothing here was counted with the models' tokenizers.
    """

    count: int
    tokens: int


GLUE = {
    "cola": (Rows(8551, 25), Rows(1043, 15)),
    "rte": (Rows(2490, 180), Rows(277, 90)),
    "mrpc": (Rows(3668, 80), Rows(408, 60)),
    "sst2": (Rows(67349, 45), Rows(872, 30)),
    "qnli": (Rows(104743, 120), Rows(5463, 70)),
    "stsb": (Rows(5749, 70), Rows(1500, 40)),
    "mnli": (Rows(392702, 90), Rows(9815, 50)),
}
TRAINING = {
    "MetaMathQA-395K.json": Rows(395000, 300),
    "commonsense_170k.json": Rows(170420, 130),
} | {f"{task}_train.jsonl": rows for task, (rows, _) in GLUE.items()}
TESTS = {
    "gsm8k_test.jsonl": Rows(1319, 130),
    "MATH_test.jsonl": Rows(5000, 150),
    "boolq/test.json": Rows(3270, 90),
    "piqa/test.json": Rows(1838, 140),
    "social_i_qa/test.json": Rows(1954, 130),
    "hellaswag/test.json": Rows(10042, 220),
    "winogrande/test.json": Rows(1267, 110),
    "ARC-Challenge/test.json": Rows(1172, 140),
    "ARC-Easy/test.json": Rows(2376, 130),
    "openbookqa/test.json": Rows(500, 110),
} | {f"{task}_validation.jsonl": rows for task, (_, rows) in GLUE.items()}


@dataclass(frozen=True)
class Hours:
    """What a command takes: its runs, and the mean hours of one."""

    name: str
    model: str
    runs: int
    rows: int
    epochs: float
    tokens: int
    training: float
    judging: float


def known(data: dict[str, Rows], source: str) -> Rows:
    """The rows of a source by the end of its path."""
    return next(rows for name, rows in data.items() if source.endswith(name))


def training_hours(gpu: Gpu, config: TrainConfig) -> float:
    """Forward and backward over all rows and epochs; full fine-tuning has a third product."""
    rows = _training_rows(config)
    rate = training_tokens_per_second(
        MODELS[config.model],
        gpu,
        r=config.r,
        tokens=config.batch_size * rows.tokens,
        sequence=rows.tokens,
        recompute=config.gradient_checkpointing,
    )
    products = 1.5 if config.method == "full" else 1
    seconds = products * config.epochs * rows.count * rows.tokens / rate
    return _slower(gpu, config) * seconds / 3600


def _slower(gpu: Gpu, config: TrainConfig) -> float:
    """Than with weights of 16 bits, for which the model is."""
    return gpu.rate("bfloat16") / gpu.rate(config.dtype)


def _training_rows(config: TrainConfig) -> Rows:
    rows = known(TRAINING, config.data)
    return dataclasses.replace(rows, count=min(rows.count, config.data_limit or rows.count))


def forward_seconds(gpu: Gpu, model: Preset, tokens: int) -> float:
    """The products of a forward pass over `tokens` tokens."""
    block = sum(gemm(gpu, tokens, layer.m, layer.n).total for layer in model.layers)
    return model.blocks * block + gemm(gpu, tokens, model.vocabulary, model.layers[0].n).total


def judging_hours(gpu: Gpu, config: TrainConfig, metric: str, source: str) -> float:
    """A test set: forward passes, and one for every token of answers as long as they may be."""
    rows, model = known(TESTS, source), MODELS[config.model]
    batch = min(config.eval_batch_size, rows.count)
    seconds = forward_seconds(gpu, model, batch * rows.tokens)
    if metric in WRITTEN:
        longest = config.max_new_tokens or WRITTEN[metric].tokens
        seconds += longest * forward_seconds(gpu, model, batch)
    return _slower(gpu, config) * math.ceil(rows.count / batch) * seconds / 3600


def metric_of(config: TrainConfig, source: str) -> str:
    """As `lorasb compare` chooses it by the form of the rows."""
    return "math" if source.endswith("MATH_test.jsonl") else config.evaluation


def hours_of(gpu: Gpu, command: str) -> Hours | None:
    """A command of the page; None for one that takes minutes."""
    options = build_parser().parse_args(shlex.split(command)[1:])
    if options.command == "compare":
        settings, contenders = listed(options)
        configs = [
            TrainConfig(
                **settings
                | {"output_dir": options.output_dir, "method": one.method, "r": one.r}
                | one.settings
            )
            for one in contenders
        ]
        tests, seeds = options.test, options.seeds
    elif options.command == "train":
        configs, tests, seeds = configs_of(given_flags(options)), [], 1
    else:
        return None
    first, rows = configs[0], _training_rows(configs[0])
    passes = 1 + (first.epochs if first.evaluate_every else 0)
    training = [training_hours(gpu, config) for config in configs]
    judging = sum(judging_hours(gpu, first, metric_of(first, t), t) for t in tests) * passes
    return Hours(
        first.output_dir,
        first.model.partition("/")[2],
        len(configs) * seeds,
        rows.count,
        first.epochs,
        rows.tokens,
        sum(training) / len(training),
        judging,
    )


def commands(page: str) -> Iterator[str]:
    """The commands of the page, and those that it names as the same for other tasks."""
    for command in re.findall(r"^ +(lorasb (?:.*\\\n)*.*)", page, re.MULTILINE):
        command = " ".join(command.replace("\\\n", " ").split())
        yield command
        folder = command.rpartition("--output-dir ")[2]
        task = folder.rpartition("-")[2]
        for other in SAME_FOR.get(folder, ()):
            yield re.sub(rf"\b{task}(?=\b|_)", other, command)


def table(gpu: Gpu, page: str) -> str:
    """The predictions as Markdown."""
    found = [one for command in commands(page) if (one := hours_of(gpu, command))]
    cells = [
        (
            one.name,
            one.model,
            str(one.runs),
            f"{one.rows:,} × {one.epochs:g}",
            str(one.tokens),
            _rounded(one.training),
            _rounded(one.judging) if one.judging else "",
            _rounded(one.runs * (one.training + one.judging)),
        )
        for one in found
    ]
    header = ("output-dir", "model", "runs", "rows × epochs", "tokens per row (assumed)")
    header += ("h training per run", "h judging per run", "h in all")
    return (
        f"PREDICTION, not measured, for an {gpu.device_name}:\n\n{markdown_table(header, cells)}\n"
    )


def _rounded(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"


def with_table(page: str, gpu: Gpu) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(START)
    return f"{before}{START}{table(gpu, page)}{END}{rest.partition(END)[2]}"


def main() -> None:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="a6000")
    parser.add_argument("--write", action="store_true", help="into docs/reproduce.md")
    options = parser.parse_args()
    page, gpu = PAGE.read_text(encoding="utf-8"), find_gpu(options.gpu)
    if options.write:
        write_text(PAGE, with_table(page, gpu))
    else:
        print(table(gpu, page))


if __name__ == "__main__":
    main()
