"""LoRA-SB, LoRA-XS, LoRA and full fine-tuning of MiniLM-L6 on the same headlines.

For each method: one run a learning rate, judged on validation rows; then the best learning
rate with three seeds, judged on test rows that nothing was chosen by. Every run is a folder
and its judgement a JSON file, so an interrupted comparison goes on where it was.
"""

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from transformers.utils import logging

from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.data import Labelled
from lorasb_kernels.train.demo import assets, headlines
from lorasb_kernels.train.files import write_json
from lorasb_kernels.train.plots import plot_losses
from lorasb_kernels.train.progress import console
from lorasb_kernels.train.run import finetune
from lorasb_kernels.train.summary import minutes, standard_error

SEEDS = (0, 1, 2)
VALIDATION_ROWS = 500


@dataclass(frozen=True)
class Contender:
    """A method with its rank and the learning rates to choose from."""

    method: str
    r: int
    learning_rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """For tables and folders."""
        return self.method if self.method == "full" else f"{self.method}-r{self.r}"


CONTENDERS = (
    Contender("lora-sb", 8, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-xs", 8, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-sb", 16, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-xs", 16, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora", 8, (8e-4, 2e-3, 5e-3)),
    Contender("full", 16, (8e-5, 2e-4, 5e-4)),
)
STEP = 2.5  # from one learning rate to the next
EXTENSIONS = 2  # learning rates added, at most, where the best one is at an end


def compare_config(
    contender: Contender, learning_rate: float, seed: int, model: Path, output_dir: Path
) -> TrainConfig:
    """The settings of one run: three epochs, batches of 32."""
    folder = output_dir / "runs" / f"{contender.name}-lr{learning_rate:g}-seed{seed}"
    return TrainConfig(
        model=str(model),
        data="headlines",
        output_dir=str(folder),
        task="classification",
        method=contender.method,
        r=contender.r,
        learning_rate=learning_rate,
        warmup_ratio=0.06,
        batch_size=32,
        epochs=3,
        max_length=64,
        init_minimum=64,
        eval_batch_size=100,
        save_steps=64,
        keep_checkpoints=1,
        seed=seed,
    )


def sweep(rates: Sequence[float], tried: dict[float, float]) -> Iterator[float]:
    """The learning rates to try: those given, and more where the best is the first or last.

    Args:
        rates: learning rates, ascending.
        tried: validation accuracy by learning rate; filled in while this goes on.
    """
    yield from rates
    for _ in range(EXTENSIONS):
        best = max(tried, key=tried.get)
        if best == max(tried):
            yield best * STEP
        elif best == min(tried):
            yield best / STEP


def run_comparison(
    output_dir: str, train_rows: int, test_rows: int, only: Sequence[str] = ()
) -> list[dict]:
    """Runs what has not been run, prints the table and draws the curves.

    Args:
        output_dir: receives `cells/*.json`, `table.json`, `loss.png` and the runs.
        train_rows: headlines trained on.
        test_rows: headlines of the final judgement.
        only: names of contenders, to run these alone; none: all.

    Returns:
        one row a contender: name, trainable, learning rate, test accuracies by seed.
    """
    logging.disable_progress_bar()
    folder = Path(output_dir)
    split = headlines.load()
    train, validation, test = (
        [Labelled(headline.text, headline.label) for headline in part[:count]]
        for part, count in zip(split, (train_rows, VALIDATION_ROWS, test_rows), strict=True)
    )
    rows, curves = [], {}
    for contender in CONTENDERS:
        if only and contender.name not in only:
            continue
        tried = {}
        for rate in sweep(contender.learning_rates, tried):
            result = cell(contender, rate, 0, folder, train, validation, "validation")
            tried[rate] = result["after"]
        best = max(tried, key=tried.get)
        final = [cell(contender, best, seed, folder, train, test, "test") for seed in SEEDS]
        curves[contender.name] = final[0]["losses"]
        rows.append(
            {
                "name": contender.name,
                "trainable": final[0]["trainable"],
                "learning_rate": best,
                "validation": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
                "test": [one["after"] for one in final],
                "seconds": statistics.mean(one["seconds"]["train"] for one in final),
            }
        )
        write_json(folder / "table.json", rows)
        plot_losses(curves, folder / "loss.png", "MiniLM-L6, headlines, seed 0", window=20)
    console.print(summary(rows, test_rows))
    return rows


def cell(contender, learning_rate, seed, folder, train, held_out, part) -> dict:
    """The result of one run on one part of the data: kept, or run now."""
    model = assets.minilm()
    config = compare_config(contender, learning_rate, seed, model, folder)
    path = folder / "cells" / f"{Path(config.output_dir).name}-{part}.json"
    if not path.exists():
        console.print(f"{contender.name}, learning rate {learning_rate:g}, seed {seed}, {part}")
        # A run that was judged on validation rows is not trained again: it goes on from
        # its last checkpoint, which is its end.
        result = finetune(config, train, held_out)[2].to_dict()
        result |= {"part": part, "rows": len(held_out)}
        if part == "test":
            shutil.rmtree(config.output_dir)
            earlier = path.with_name(path.name.replace("-test.json", "-validation.json"))
            if earlier.exists():  # the training time is there
                result["seconds"] = json.loads(earlier.read_text())["seconds"]
        write_json(path, result)
    return json.loads(path.read_text(encoding="utf-8"))


def summary(rows: list[dict], test_rows: int) -> Table:
    """Mean test accuracy over the seeds, its spread, and the learning rate that was chosen."""
    table = Table(title=f"MiniLM-L6 on headlines, {len(SEEDS)} seeds, {test_rows} test rows")
    table.add_column("method")
    for column in ("trainable", "learning rate", "accuracy", "seeds", "± rows", "train"):
        table.add_column(column, justify="right")
    for row in rows:
        mean = statistics.mean(row["test"])
        table.add_row(
            row["name"],
            f"{row['trainable']:,}",
            f"{row['learning_rate']:g}",
            f"{mean:.4f}",
            f"{min(row['test']):.4f}–{max(row['test']):.4f}",
            f"{standard_error(mean, test_rows):.4f}",
            minutes(row["seconds"]),
        )
    return table
