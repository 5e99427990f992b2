"""The demonstration: SmolLM2-135M-Instruct learns to tell sarcastic headlines from others.

LoRA-SB at r = 16 on all 210 linear layers trains 53,760 numbers. From a real model (its weights
come as a 4-bit GGUF, dequantized to float32) and real data to a merged model that plain
transformers loads.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lorasb_kernels import merge_and_unload
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.demo import assets, headlines
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import InputError
from lorasb_kernels.train.evaluation import generate
from lorasb_kernels.train.progress import console
from lorasb_kernels.train.run import Clock, Result, finetune
from lorasb_kernels.train.samples import Example
from lorasb_kernels.train.summary import Curve, loss_figure, minutes, standard_error
from lorasb_kernels.utils.figures import save_png
from lorasb_kernels.utils.files import atomic_folder

STEPS = 60
BATCH = 16
HELD_OUT = 300
SHOWN = 6
LEARNING_RATE = 5e-3
# η of LoRA-SB's update. The schedule's first learning rate, 1.25e-3, is too large for this model:
# training would start at a loss of 6 and need a dozen steps to recover.
INIT_LEARNING_RATE = 1e-4
QUESTION = "Sarcastic? {}"
ANSWERS = ("no", "yes")


def as_example(headline: headlines.Headline) -> Example:
    """The headline as a question that is answered `yes` or `no`."""
    return Example(QUESTION.format(headline.text), ANSWERS[headline.label], ANSWERS)


def demo_config(model: Path, output_dir: Path) -> TrainConfig:
    """The settings of the demonstration."""
    return TrainConfig(
        model=str(model),
        data="headlines",
        output_dir=str(output_dir),
        method="lora-sb",
        r=16,
        learning_rate=LEARNING_RATE,
        init_learning_rate=INIT_LEARNING_RATE,
        warmup_ratio=0.06,
        batch_size=BATCH,
        max_steps=STEPS,
        max_length=128,
        system_prompt="",
        init_minimum=64,
        evaluation="choice",
        eval_batch_size=50,
        save_steps=20,
    )


def run_demo(output_dir: str) -> Result:
    """Runs the demonstration and prints the results.

    Args:
        output_dir: receives the checkpoints, `adapter/`, `merged/`, `loss.png` and
            `result.json`. An earlier demonstration in it is replaced.

    Raises:
        AssetError: the model or the data cannot be fetched.
        InputError: `output_dir` contains something else.
    """
    start = time.perf_counter()
    logging.disable_progress_bar()
    folder = Path(output_dir)
    clear(folder)
    clock = Clock()
    with clock.phase("fetch and convert"):
        model_folder = assets.smollm2()
        split = headlines.load()
    train_rows = [as_example(headline) for headline in split.train[: STEPS * BATCH]]
    test_rows = [as_example(headline) for headline in split.test[:HELD_OUT]]
    config = demo_config(model_folder, folder)
    model, encoder, result = finetune(config, train_rows, test_rows, judge_before=True)
    with clock.phase("merge and export"):
        merge_and_unload(model, safe_merge=True)
        with atomic_folder(folder / "merged") as building:
            model.save_pretrained(building)
            encoder.tokenizer.save_pretrained(building)
    with clock.phase("answer"):
        answers = ask(folder / "merged", encoder, test_rows[:SHOWN])
    curve = Curve(config.method, config.r, result.losses)
    save_png(loss_figure([curve], "SmolLM2-135M, headlines"), folder / "loss.png")
    result.seconds |= clock.seconds | {"total": time.perf_counter() - start}
    console.print(summary(result, folder))
    console.print(answers_table(test_rows[:SHOWN], answers))
    console.print(what_next(folder), soft_wrap=True)
    return result


def clear(folder: Path) -> None:
    """Removes an earlier demonstration.

    Raises:
        InputError: the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").exists():
        raise InputError(f"output_dir is {str(folder)!r}; expected a new folder or an old demo's")
    shutil.rmtree(folder)


def ask(merged: Path, encoder: Encoder, rows: Sequence[Example]) -> list[str]:
    """The exported model's answers, as plain transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(merged)
    return generate(model, encoder, [encoder.question(row) for row in rows], max_new_tokens=8)


def answers_table(rows: Sequence[Example], answers: Sequence[str]) -> Table:
    """What the exported model says to the first held-out headlines, and what is right."""
    table = Table(title="the first held-out headlines")
    table.add_column("asked")
    table.add_column("answered")
    table.add_column("right")
    for row, answer in zip(rows, answers, strict=True):
        style = "green" if answer.strip() == row.response else "red"
        table.add_row(row.instruction, f"[{style}]{answer.strip()}[/]", row.response)
    return table


def what_next(folder: Path) -> str:
    """Commands that go on from the demonstration; `lorasb` is where this Python has its scripts."""
    lorasb = Path(sys.executable).with_name("lorasb")
    data = "--data chats.jsonl --output-dir out/mine"
    return (
        "What next:\n"
        f"  ask it           {lorasb} chat --run {folder}\n"
        f"  your own data    {lorasb} train --model {assets.smollm2()} {data}\n"
        f"  its settings     {lorasb} train --help\n"
        f"  serve it         {folder / 'merged'} is a plain model of transformers"
    )


def summary(result: Result, folder: Path) -> Table:
    """What was trained, what it reached, how long each part took, where things are."""
    table = Table(title="LoRA-SB demonstration", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    losses = [loss for _, loss in result.losses]
    error = standard_error(result.after, HELD_OUT)
    table.add_row("model", "SmolLM2-135M-Instruct (from 4-bit weights, Q4_1), r = 16")
    table.add_row("trained", f"{result.trainable:,} numbers, {result.steps} steps of {BATCH}")
    table.add_row("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}")
    table.add_row(
        "accuracy",
        f"{result.before:.3f} → {result.after:.3f} (± {error:.3f}, {HELD_OUT} held-out headlines)",
    )
    table.add_section()
    for phase, seconds in result.seconds.items():
        table.add_row(phase, minutes(seconds))
    table.add_section()
    for name, path in (("adapter", "adapter"), ("merged model", "merged"), ("plot", "loss.png")):
        table.add_row(name, str(folder / path))
    return table
