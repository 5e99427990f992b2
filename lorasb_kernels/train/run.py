"""One training run from its configuration: load, prepare, train, evaluate, save."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.train.batching import Collator, pack
from lorasb_kernels.train.checkpoint import check
from lorasb_kernels.train.config import ADAPTER_METHODS, TrainConfig
from lorasb_kernels.train.data import (
    Example,
    Labelled,
    read_examples,
    read_labelled,
)
from lorasb_kernels.train.encoding import Encoded, Encoder, check_lengths
from lorasb_kernels.train.errors import CheckpointError, ConfigError, DataError
from lorasb_kernels.train.evaluation import WRITTEN, check_rows, evaluate
from lorasb_kernels.train.methods import ADAPTER_FOLDER, prepare
from lorasb_kernels.train.progress import TrainingBar, console, track
from lorasb_kernels.train.separation import check_separation
from lorasb_kernels.train.templates import TEMPLATES
from lorasb_kernels.train.trainer import (
    AdapterTrainer,
    checkpoints,
    initial_step,
    remove_remains,
    training_arguments,
)
from lorasb_kernels.utils.files import read_json, write_json

Rows = Sequence[Example] | Sequence[Labelled]


@dataclass
class Result:
    """Outcome of a run: `before` and `after` are the metric on the held-out rows."""

    config: TrainConfig
    trainable: int
    steps: int
    before: float | None
    after: float | None
    losses: list[tuple[int, float]]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As JSON values; `losses` are (step, loss) pairs."""
        return vars(self) | {"config": self.config.to_dict()}


class Clock:
    """Measures the seconds of named phases."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed


def read_training(config: TrainConfig) -> Rows:
    """The rows of `config.data`."""
    return _read(config, config.data, config.data_format, config.data_limit)


def read_held_out(config: TrainConfig, source: str) -> Rows:
    """The evaluation rows of a source, in any form of the task."""
    return _read(config, source, None, None)


def _read(config: TrainConfig, source: str, data_format: str | None, limit: int | None) -> Rows:
    if config.task == "causal-lm":
        return read_examples(source, data_format, limit)
    return read_labelled(source, config.evaluation == "pearson", data_format, limit)


def load_model(config: TrainConfig, rows: Rows) -> tuple[nn.Module, object]:
    """The pretrained model for the task, in `config.dtype`, and its tokenizer."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(config.seed)  # a new classification head is random
    if config.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype), tokenizer
    regression = config.evaluation == "pearson"
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        dtype=dtype,
        num_labels=1 if regression else max(row.label for row in rows) + 1,
        problem_type="regression" if regression else "single_label_classification",
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def make_encoder(config: TrainConfig, tokenizer: object) -> Encoder:
    """The encoder of a run."""
    template = None if config.template is None else TEMPLATES[config.template]
    options = (config.system_prompt, template, config.response_prefix, config.stop)
    return Encoder(tokenizer, config.max_length, *options)


def encode(encoder: Encoder, config: TrainConfig, rows: Rows, what: str) -> list[Encoded]:
    """The rows as samples; says once what `max_length` cut or left out.

    Raises:
        DataError: a larger share than `config.max_cut_share` was.
    """
    samples = (encoder.examples if config.task == "causal-lm" else encoder.labelled)(rows)
    message = check_lengths(rows, samples, config.max_length, config.max_cut_share, what)
    if message and is_main_process():
        console.print(message)
    return samples


def finetune(
    config: TrainConfig,
    train_rows: Rows,
    eval_rows: Rows = (),
    *,
    judge_before: bool = False,
    callbacks: Sequence = (),
) -> tuple[nn.Module, Encoder, Result]:
    """Trains `config.model` on `train_rows`; resumes from the newest checkpoint, if any.

    Args:
        config: the run; its `output_dir` receives `config.json`, the checkpoints, the
            trained adapter (or model) and `result.json`.
        train_rows: what to train on.
        eval_rows: held-out rows; empty for no evaluation.
        judge_before: evaluate the untrained model as well.
        callbacks: more callbacks for transformers' Trainer.

    Returns:
        the trained model, its encoder and the result.

    Raises:
        ConfigError: `output_dir` holds a run with other settings.
        DataError: no usable training row.
        CheckpointError: a damaged checkpoint, or a trained adapter without its checkpoints.
        DivergedError: a loss or gradient that is not finite.
    """
    output_dir = Path(config.output_dir)
    arguments = training_arguments(config)
    claim(output_dir, config, train_rows)
    resume_from = next(iter(reversed(checkpoints(output_dir))), None)
    if resume_from is not None:
        check(resume_from, arguments.world_size)
    elif (output_dir / "result.json").exists():
        raise CheckpointError(
            f"{output_dir} holds a trained adapter and none of the checkpoints that led to it; "
            "expected them, or another output_dir"
        )
    if is_main_process():
        remove_remains(output_dir)
    clock = Clock()
    with clock.phase("load"):
        model, tokenizer = load_model(config, train_rows)
        encoder = make_encoder(config, tokenizer)
        samples = encode(encoder, config, train_rows, "training")
        if not samples:
            raise DataError(f"no training row fits into max_length = {config.max_length} tokens")
        check_rows(encoder, eval_rows, config.evaluation)
        if eval_rows and config.evaluation not in (*WRITTEN, "choice"):
            encode(encoder, config, eval_rows, "evaluation")
        unpacked = samples
        if config.batching == "packed":
            samples = pack(samples, config.max_length)
    model.to(arguments.device)
    batch_size = max(config.batch_size, config.eval_batch_size)
    if config.batching == "packed" or batch_size > 1:
        check_separation(model, unpacked, encoder.pad_token_id, config.batching == "packed")

    def judge(description: str) -> float | None:
        if not eval_rows:
            return None
        # As in training: trained tensors are fp32 and are used in the dtype of the weights.
        mixed = torch.autocast(arguments.device.type, torch.bfloat16, config.dtype == "bfloat16")
        with clock.phase("evaluate"), mixed:
            return evaluate(
                model,
                encoder,
                eval_rows,
                config.evaluation,
                batch_size=config.eval_batch_size,
                max_new_tokens=config.max_new_tokens,
                progress=track(description) if is_main_process() else iter,
            )

    before = judge(f"{config.evaluation} before") if judge_before else None
    with clock.phase("initialize"):
        model = prepare(
            model,
            config,
            unpacked,
            tokenizer.pad_token_id,
            initial_step(config, arguments, len(samples)),
            progress=is_main_process(),
        )
    bars = [TrainingBar(f"train {config.method}")] if is_main_process() else []
    trainer = AdapterTrainer(
        config,
        model=model,
        train_dataset=samples,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[*bars, *callbacks],
    )
    with clock.phase("train"):
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    after = judge(f"{config.evaluation} after")
    result = Result(
        config=config,
        trainable=sum(p.numel() for p in trainer.trained_parameters().values()),
        steps=trainer.state.global_step,
        before=before,
        after=after,
        losses=[(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log],
        seconds=clock.seconds,
    )
    if is_main_process():
        save(model, tokenizer, config)
        write_json(output_dir / "result.json", result.to_dict())
    trainer.accelerator.wait_for_everyone()
    return model, encoder, result


def digest_of(rows: Rows) -> str:
    """SHA-256 of the training rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def claim(output_dir: Path, config: TrainConfig, rows: Rows) -> None:
    """Records this run in the output folder, or checks that the folder belongs to this run.

    Args:
        output_dir: gets `config.json`, the settings, and `data.json`, a digest of the rows.
        config: the settings.
        rows: the training rows.

    Raises:
        ConfigError: the folder belongs to a run with other settings or rows, or its files
            are damaged.
    """
    own, data = config.to_dict(), {"rows": len(rows), "sha256": digest_of(rows)}
    files = {"data.json": data, "config.json": own}
    if not (output_dir / "config.json").exists():
        if is_main_process():
            for name, value in files.items():
                write_json(output_dir / name, value)
        return
    try:
        known, stored = (read_json(output_dir / name) for name in files)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}; expected what the run in output_dir wrote") from error
    if known != data:
        raise ConfigError(
            f"data is {len(rows)} rows that are not those of the run in output_dir "
            f"{str(output_dir)!r}; expected the same rows, or another output_dir"
        )
    # Settings that an earlier version did not have are compared with their default.
    stored = TrainConfig(**{name: stored[name] for name in own if name in stored}).to_dict()
    for name in own:
        if stored[name] != own[name]:
            raise ConfigError(
                f"{name} is {own[name]!r}, but output_dir {str(output_dir)!r} holds a run with "
                f"{stored[name]!r}; expected the same settings or another output_dir"
            )


def save(model: nn.Module, tokenizer, config: TrainConfig) -> None:
    """Saves the trained adapter, or for `full` the model, in `output_dir`."""
    output_dir = Path(config.output_dir)
    if config.method in ADAPTER_METHODS:
        from lorasb_kernels import save_adapter

        save_adapter(model, output_dir / ADAPTER_FOLDER)
    else:
        name = "model" if config.method == "full" else ADAPTER_FOLDER
        model.save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
