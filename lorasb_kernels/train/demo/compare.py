"""Methods of fine-tuning MiniLM-L6 on the same headlines: `lorasb demo-compare` and `compare`."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from lorasb_kernels.train.comparison import Comparison, Contender, Task
from lorasb_kernels.train.demo import assets, headlines
from lorasb_kernels.train.progress import console
from lorasb_kernels.train.samples import Labelled

SEEDS = (0, 1, 2)
VALIDATION_ROWS = 500
EXTENSIONS = 2  # largest number of rates to add if the best one is the first or the last
CONTENDERS = (
    Contender("lora-sb", 8, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-xs", 8, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-sb", 16, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora-xs", 16, (4e-3, 1e-2, 2.5e-2)),
    Contender("lora", 8, (8e-4, 2e-3, 5e-3)),
    Contender("full", 16, (8e-5, 2e-4, 5e-4)),
)

RANKS = (8, 16, 32)
# Every rank chooses among these; the ablations use what their baseline chose.
RATES = {
    "lora-sb": (1e-2, 2.5e-2),
    "lora-xs": (4e-3, 1e-2, 2.5e-2),
    "lora": (8e-4, 2e-3, 5e-3),
    "rslora": (8e-4, 2e-3, 5e-3),
    "pissa": (8e-4, 2e-3),
    "dora": (2e-3, 5e-3),
    "lora-one": (8e-4, 2e-3),
    "lora-pro": (8e-5, 2e-4, 5e-4),  # its steps of the weight are those of full fine-tuning
    "lora-ga": (8e-4, 2e-3),
    "vera": (2.5e-2, 6.25e-2, 1.5625e-1),
}
# η of `compare`. In a short run the first of a few warm-up steps is a large share of the peak
# learning rate: an update of that size would start above the loss of the unchanged model.
ETA = 5e-4
FULL = Contender("full", 8, (8e-5, 2e-4, 5e-4))
METHODS = (
    FULL,
    *(Contender(method, r, rates) for r in RANKS for method, rates in RATES.items()),
)


def _variant(label: str, method: str = "lora-sb", **settings) -> Contender:
    return Contender(method, RANKS[0], (), settings, label, rate_of="lora-sb-r8")


# The LoRA-SB paper's ablations: its initialization, and the number of samples behind it.
BASELINE = Contender("lora-sb", RANKS[0], RATES["lora-sb"])
ABLATIONS = (
    BASELINE,
    _variant("kaiming-svd", "kaiming-svd"),
    *(_variant(f"noise-{std:g}", "noise", noise_std=std) for std in (1e-5, 1e-4, 1e-3, 1e-2)),
    _variant("lora-sb-sgd", "lora-sb-sgd"),
    _variant("scaled-b", "scaled-b"),
    # Without clipping, as a clipped gradient of R and of the head is no longer a rescaled one.
    _variant("scaled-b-unclipped", "scaled-b", max_grad_norm=0.0),
    _variant("scaled-b-optimal", "scaled-b", max_grad_norm=0.0, optimal_gradient=True),
    _variant("scaled-b-orthonormal", "scaled-b", orthonormalize=True),
    *(_variant(f"samples-{n}", init_minimum=n) for n in (1, 5, 20, 100, 500)),
    Contender(
        "lora-one",
        RANKS[0],
        (),
        {"optimizer": "adamw"},
        "lora-one-adamw",
        rate_of=f"lora-one-r{RANKS[0]}",
    ),
    Contender("lora-one", RANKS[0], RATES["lora-one"]),
)
SUITES = {"methods": METHODS, "ablations": ABLATIONS}


def headlines_task(
    train_rows: int, test_rows: int, epochs: float, eta: float | None = None
) -> Task:
    """MiniLM-L6 learns to tell sarcastic headlines from others, in batches of 32.

    Args:
        train_rows, test_rows: headlines.
        epochs: passes over them.
        eta: η of LoRA-SB's update; None for the schedule's first learning rate.
    """
    train, validation, test = (
        [Labelled(headline.text, headline.label) for headline in part[:count]]
        for part, count in zip(
            headlines.load(), (train_rows, VALIDATION_ROWS, test_rows), strict=True
        )
    )
    settings = {
        "model": str(assets.minilm()),
        "data": "headlines",
        "task": "classification",
        "warmup_ratio": 0.06,
        "batch_size": 32,
        "epochs": epochs,
        "max_length": 64,
        "init_minimum": 64,
        "init_learning_rate": eta,
        "eval_batch_size": 100,
        "save_steps": 64,
    }
    return Task("MiniLM-L6, headlines", settings, train, validation, {"test": test})


def run_comparison(
    output_dir: str, train_rows: int, test_rows: int, only: Sequence[str] = ()
) -> list[dict]:
    """`lorasb demo-compare`: three epochs; runs what has not been run, prints the table.

    Args:
        output_dir: receives `cells/*.json`, `table.json`, `loss.png` and the runs.
        train_rows: headlines trained on.
        test_rows: headlines of the final evaluation.
        only: names of the contenders to run; empty for all.

    Returns:
        one row per contender, as `Comparison.row` makes them.
    """
    logging.disable_progress_bar()
    task = headlines_task(train_rows, test_rows, epochs=3)
    comparison = Comparison(task, Path(output_dir), SEEDS, EXTENSIONS)
    rows = comparison.run(CONTENDERS, only)
    console.print(comparison.summary(rows))
    return rows
