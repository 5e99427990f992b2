"""Several methods on one task from the same base, seeds and data order.

For each contender: one run per learning rate, evaluated on validation rows; then the best learning
rate with several seeds, evaluated on test rows that were not used for any choice. For every
contender a seed fixes the new head, the order of the samples and the draws of the initialization.
Every run is a folder and its result a JSON file (a cell), so an interrupted comparison resumes
where it stopped and can be extended later.
"""

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lorasb_kernels.profiling.memory_peak import peak_memory
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.progress import console
from lorasb_kernels.train.run import Rows, finetune, judged
from lorasb_kernels.train.summary import Curve, loss_figure
from lorasb_kernels.utils.figures import save_png
from lorasb_kernels.utils.files import write_json, write_text
from lorasb_kernels.utils.tables import markdown_table

STEP = 2.5  # from one learning rate to the next
LAST = 0.1  # share of the steps whose mean is the final loss


@dataclass(frozen=True)
class Contender:
    """A method with its rank and the learning rates to choose from.

    Args:
        method, r: as in `TrainConfig`.
        learning_rates: ascending.
        settings: other settings of `TrainConfig`.
        label: name, instead of `<method>-r<r>`.
        rate_of: name of an earlier contender, whose chosen learning rate this one takes.
    """

    method: str
    r: int
    learning_rates: tuple[float, ...] = ()
    settings: dict = field(default_factory=dict)
    label: str = ""
    rate_of: str = ""

    @property
    def name(self) -> str:
        """For tables and folders."""
        return self.label or (self.method if self.method == "full" else f"{self.method}-r{self.r}")

    def curve(self, losses: Sequence[tuple[int, float]]) -> Curve:
        """Its (step, loss) points for a figure."""
        return Curve(self.label or self.method, None if self.method == "full" else self.r, losses)


@dataclass(frozen=True)
class Task:
    """What the contenders are compared on.

    Args:
        title: for the table and the plot.
        settings: settings of `TrainConfig` common to all, `model` and `data` among them.
        train, validation: rows.
        test: rows by the name of their test set; the score of a run is the average over the
            sets. All rows are disjoint, but for tasks whose papers choose by the test rows.
        metrics: of test sets that another metric than `evaluation` judges, by name.
        metric: what `evaluation` measures; higher is better, except for `"loss"`.
    """

    title: str
    settings: dict
    train: Rows
    validation: Rows
    test: dict[str, Rows]
    metric: str = "accuracy"
    metrics: dict[str, str] = field(default_factory=dict)


def sweep(
    rates: Sequence[float], tried: dict[float, float], extensions: int = 0
) -> Iterator[float]:
    """The learning rates to try: those given, and more if the best is the first or the last.

    Args:
        rates: learning rates, ascending.
        tried: validation score by learning rate, higher is better; filled in by the caller between
            two rates.
        extensions: largest number of rates to add.
    """
    yield from rates
    for _ in range(extensions):
        best = max(tried, key=tried.get)
        if best == max(tried):
            yield best * STEP
        elif best == min(tried):
            yield best / STEP


class Comparison:
    """Runs cells in a folder and summarizes them.

    Args:
        task: the task.
        folder: receives `cells/*.json`, `table.json`, `table.md`, `loss.png` and the runs.
        seeds: of the final runs; the first one is also the seed of the sweep.
        extensions: see `sweep`.
    """

    def __init__(self, task: Task, folder: Path, seeds: Sequence[int], extensions: int = 0):
        self.task, self.folder, self.seeds = task, Path(folder), tuple(seeds)
        self.extensions = extensions

    def run(self, contenders: Sequence[Contender], only: Sequence[str] = ()) -> list[dict]:
        """Runs what has not been run and writes the table and the curves after each contender.

        Args:
            contenders: what to compare.
            only: names of the contenders to run; empty for all.

        Returns:
            one row per contender, see `row`.

        Raises:
            ConfigError: a name that no contender has.
        """
        known = {contender.name: contender for contender in contenders}
        unknown = [name for name in only if name not in known]
        if unknown:
            raise ConfigError(f"no contender {unknown[0]!r}; expected some of {', '.join(known)}")
        rows, curves = [], []
        for contender in contenders:
            if only and contender.name not in only:
                continue
            chooses = known[contender.rate_of] if contender.rate_of else contender
            tried = self.validated(chooses)
            best = max(tried, key=tried.get) if tried else chooses.learning_rates[0]
            final = [self.cell(contender, best, seed, "test") for seed in self.seeds]
            rows.append(self.row(contender, best, tried, final))
            curves.append(contender.curve(final[0]["losses"]))
            write_json(self.folder / "table.json", rows)
            write_text(self.folder / "table.md", self.markdown(rows))
            title = f"{self.task.title}, seed {self.seeds[0]}"
            save_png(loss_figure(curves, title, window=20), self.folder / "loss.png")
        return rows

    def validated(self, contender: Contender) -> dict[float, float]:
        """Validation scores by learning rate, higher is better; empty if there is only one rate."""
        if len(contender.learning_rates) == 1:
            return {}
        sign = -1 if self.task.metric == "loss" else 1
        tried: dict[float, float] = {}
        for rate in sweep(contender.learning_rates, tried, self.extensions):
            tried[rate] = sign * self.cell(contender, rate, self.seeds[0], "validation")["after"]
        return tried

    def config(self, contender: Contender, learning_rate: float, seed: int) -> TrainConfig:
        """The settings of one run."""
        folder = self.folder / "runs" / f"{contender.name}-lr{learning_rate:g}-seed{seed}"
        return TrainConfig(
            **{
                **self.task.settings,
                "output_dir": str(folder),
                "method": contender.method,
                "r": contender.r,
                "learning_rate": learning_rate,
                "keep_checkpoints": 1,
                "seed": seed,
                **contender.settings,
            }
        )

    def cell(self, contender: Contender, learning_rate: float, seed: int, part: str) -> dict:
        """The result of one run on one part of the data: read from its file, or run now."""
        config = self.config(contender, learning_rate, seed)
        path = self.folder / "cells" / f"{Path(config.output_dir).name}-{part}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        console.print(f"{contender.name}, learning rate {learning_rate:g}, seed {seed}, {part}")
        sets = self.task.test if part == "test" else {"validation": self.task.validation}
        first = next(iter(sets.values()))
        # A run that was evaluated on validation rows is not trained again: it resumes from its last
        # checkpoint, which is at its end.
        with peak_memory() as peak:
            model, encoder, result = finetune(config, self.task.train, first)
        values = {}
        for name, rows in sets.items():
            metric = self.task.metrics.get(name, config.evaluation)
            known = rows is first and metric == config.evaluation
            values[name] = (
                result.after if known else judged(model, encoder, config, rows, name, metric)
            )
        cell = result.to_dict() | {"part": part, "peak_bytes": peak.bytes, "sets": values}
        cell |= {"after": statistics.mean(values.values()), "rows": sum(map(len, sets.values()))}
        if part == "test":
            shutil.rmtree(config.output_dir)
            earlier = path.with_name(path.name.replace("-test.json", "-validation.json"))
            if earlier.exists():  # it has the time and memory of the training
                trained = json.loads(earlier.read_text(encoding="utf-8"))
                cell |= {key: trained.get(key) for key in ("seconds", "peak_bytes")}
        write_json(path, cell)
        return cell

    def row(
        self, contender: Contender, rate: float, tried: dict[float, float], final: list[dict]
    ) -> dict:
        """The results of a contender: means over the seeds, and the metric of each seed."""
        count = max(1, round(LAST * len(final[0]["losses"])))
        ends = [statistics.mean(loss for _, loss in one["losses"][-count:]) for one in final]
        peaks = [one["peak_bytes"] for one in final if one.get("peak_bytes") is not None]
        return {
            "name": contender.name,
            "trainable": final[0]["trainable"],
            "learning_rate": rate,
            "validation": {f"{value:g}": abs(tried[value]) for value in sorted(tried)},
            "test": [one["after"] for one in final],
            "sets": {
                name: [one.get("sets", {name: one["after"]})[name] for one in final]
                for name in self.task.test
            },
            "loss": statistics.mean(ends),
            "seconds": statistics.mean(one["seconds"]["train"] for one in final),
            "init_seconds": statistics.mean(one["seconds"]["initialize"] for one in final),
            "steps_per_second": statistics.mean(
                one["steps"] / one["seconds"]["train"] for one in final
            ),
            "peak_bytes": max(peaks) if peaks else None,
        }

    def markdown(self, rows: list[dict]) -> str:
        """The table as Markdown."""
        header, body = self._cells(rows)
        note = f"{self.task.title}; {len(self.seeds)} seeds, {self._test_rows()} test rows."
        return f"{note}\n\n{markdown_table(header, body)}\n"

    def summary(self, rows: list[dict]) -> Table:
        """The columns that fit a terminal of 80; the caption names the others, in table.md."""
        title = f"{self.task.title}, {len(self.seeds)} seeds, {self._test_rows()} test rows"
        header, body = self._cells(rows)
        shown = ["method", self._score, "trainable", "learning rate", "final loss", "memory MB"]
        others = ", ".join(name for name in header if name not in shown)
        table = Table(
            title=title,
            caption=f"{self.folder / 'table.md'} also has: {others}",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in shown:
            first = name == "method"  # a long name goes on in the next line; numbers stay whole
            table.add_column(
                name if name == self._score else name.replace(" ", "\n"),
                justify="left" if first else "right",
                no_wrap=not first,
                overflow="fold",
            )
        for line in body:
            cells = dict(zip(header, line, strict=True))
            table.add_row(*(cells[name] for name in shown))
        return table

    @property
    def _score(self) -> str:
        return f"{self.task.metric} ± std"

    def _cells(self, rows: list[dict]) -> tuple[list[str], list[list[str]]]:
        header = ["method", "trainable", "learning rate", "final loss", self._score]
        header += ["median", "best"]
        several = len(self.task.test) > 1
        header += list(self.task.test) if several else []
        header += ["by seed", "steps/s", "memory MB", "init s"]
        best = min if self.task.metric == "loss" else max
        return header, [
            [
                row["name"],
                f"{row['trainable']:,}",
                f"{row['learning_rate']:g}",
                f"{row['loss']:.4f}",
                f"{statistics.mean(row['test']):.4f} ± {_std(row['test']):.4f}",
                f"{statistics.median(row['test']):.4f}",
                f"{best(row['test']):.4f}",
                *(f"{statistics.mean(values):.4f}" for values in row["sets"].values() if several),
                " ".join(f"{value:.4f}" for value in row["test"]),
                f"{row['steps_per_second']:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['init_seconds']:.1f}",
            ]
            for row in rows
        ]

    def _test_rows(self) -> int:
        return sum(map(len, self.task.test.values()))


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
