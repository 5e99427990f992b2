"""One training run from its configuration: load, prepare, train, evaluate, save."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.train import changed_base
from lorasb_kernels.train.batching import Collator, pack
from lorasb_kernels.train.checkpoint import check
from lorasb_kernels.train.config import ADAPTER_METHODS, TrainConfig
from lorasb_kernels.train.data import read_examples, read_labelled
from lorasb_kernels.train.encoding import Encoded, Encoder, check_lengths
from lorasb_kernels.train.errors import CheckpointError, ConfigError, DataError, setting_errors
from lorasb_kernels.train.evaluation import WRITTEN, check_rows, evaluate
from lorasb_kernels.train.methods import prepare, save_start
from lorasb_kernels.train.output_folder import (
    ADAPTER_FOLDER,
    checkpoints,
    claim,
    difference,
    is_trained,
    locked,
    remove_remains,
)
from lorasb_kernels.train.preview import preview
from lorasb_kernels.train.progress import TrainingBar, console
from lorasb_kernels.train.samples import Conversation, Example, Labelled
from lorasb_kernels.train.selection import EpochEvaluation, epoch_values, restore_best
from lorasb_kernels.train.separation import check_separation
from lorasb_kernels.train.templates import TEMPLATES
from lorasb_kernels.train.trainer import (
    AdapterTrainer,
    initial_step,
    training_arguments,
)
from lorasb_kernels.utils.files import atomic_folder, write_json
from lorasb_kernels.utils.progress import track

Rows = Sequence[Example | Conversation] | Sequence[Labelled]


@dataclass
class Result:
    """Outcome of a run: `before` and `after` are the metric on the held-out rows, `epochs` that of
    every epoch, for runs that evaluate them."""

    config: TrainConfig
    trainable: int
    steps: int
    before: float | None
    after: float | None
    losses: list[tuple[int, float]]
    seconds: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)

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
    return read_labelled(source, config.regression, data_format, limit)


def load_model(config: TrainConfig, rows: Rows) -> tuple[nn.Module, object]:
    """The pretrained model for the task, in `config.dtype`, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(config)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(config.seed)  # a new classification head is random
    if config.task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype), tokenizer
    regression = config.regression
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        dtype=dtype,
        num_labels=1 if regression else max(row.label for row in rows) + 1,
        problem_type="regression" if regression else "single_label_classification",
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_tokenizer(config: TrainConfig) -> object:
    """The tokenizer of the model, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        print(message)
    return samples


def load(
    config: TrainConfig, rows: Rows, device: torch.device
) -> tuple[nn.Module, Encoder, list[Encoded]]:
    """The pretrained model on `device`, its encoder, and the training rows as samples.

    Raises:
        ConfigError: no such model, or one that mixes the samples of a batch.
        DataError: no usable training row.
    """
    with setting_errors(f"model is {config.model!r}: "):
        model, tokenizer = load_model(config, rows)
    encoder = make_encoder(config, tokenizer)
    samples = encode(encoder, config, rows, "training")
    if not samples:
        raise DataError(f"no training row fits into max_length = {config.max_length} tokens")
    model.to(device)
    packed = config.batching == "packed"
    if packed or max(config.batch_size, config.eval_batch_size) > 1:
        check_separation(model, samples, encoder.pad_token_id, packed)
    return model, encoder, samples


def make_trainable(
    model: nn.Module,
    config: TrainConfig,
    encoder: Encoder,
    samples: list[Encoded],
    found: Path | None = None,
) -> tuple[nn.Module, list[Encoded]]:
    """Makes `model` trainable, see `prepare`; returns it and what it is trained on, packed or not.

    Args:
        model, encoder, samples: from `load`.
        config: the run.
        found: a saved adapter to start from.
    """
    packed = config.batching == "packed"
    batched = pack(samples, config.max_length) if packed else samples
    eta = initial_step(config, training_arguments(config), len(batched))
    pad, main = encoder.pad_token_id, is_main_process()
    return prepare(model, config, samples, pad, eta, found, progress=main), batched


def finetune(
    config: TrainConfig,
    train_rows: Rows,
    eval_rows: Rows = (),
    *,
    judge_before: bool = False,
    callbacks: Sequence = (),
) -> tuple[nn.Module, Encoder, Result]:
    """Trains `config.model` on `train_rows`; resumes from the newest checkpoint, if there is one.

    The settings, the rows, the model and the adapter are checked before the first file is
    written, and the trained adapter is saved before it is evaluated. A run with other settings in
    `output_dir` is replaced if it has no results yet.

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
        ConfigError: a setting that does not fit the model; `output_dir` holds results of a run
            with other settings, an adapter that the settings do not describe, or is another
            process's.
        DataError: no usable training row, or an evaluation row that cannot be judged.
        CheckpointError: a damaged checkpoint, or none left of a run that was trained.
        DivergedError: a loss or gradient that is not finite.
    """
    folder = Path(config.output_dir)
    if config.evaluate_every is not None and not eval_rows:
        raise ConfigError(
            f"evaluate_every is {config.evaluate_every!r} and there is nothing to evaluate on; "
            "expected eval_data"
        )
    arguments = training_arguments(config)
    clock = Clock()
    with locked(folder) if is_main_process() else contextlib.nullcontext():
        start = find_start(folder, config, train_rows, arguments.world_size)
        with clock.phase("load"):
            model, encoder, samples = load(config, train_rows, arguments.device)
            if is_main_process():
                console.print(preview(encoder.tokenizer, samples[0], train_rows[0]))
            check_rows(encoder, eval_rows, config.evaluation)
            if eval_rows and config.evaluation not in (*WRITTEN, "choice"):
                encode(encoder, config, eval_rows, "evaluation")

        def judge(when: str) -> float | None:
            with clock.phase("evaluate"):
                return judged(model, encoder, config, eval_rows, when) if eval_rows else None

        before = judge("before") if judge_before else None
        with clock.phase("initialize"):
            model, batched = make_trainable(model, config, encoder, samples, start.adapter)
        bars = [TrainingBar(config.method)] if is_main_process() else []
        with setting_errors():
            trainer = AdapterTrainer(
                config,
                model=model,
                train_dataset=batched,
                data_collator=Collator(encoder.pad_token_id),
                callbacks=[*bars, *callbacks],
            )
        if config.evaluate_every is not None:
            every = EpochEvaluation(
                config, lambda: judge("so far"), trainer.trained_parameters, is_main_process()
            )
            trainer.add_callback(every)
        # Past this barrier no rank takes what is written now for an earlier run's.
        trainer.accelerator.wait_for_everyone()
        if is_main_process():
            claim(folder, config, train_rows, replaces=start.replaces is not None)
            if start.adapter is None:
                save_start(model, config)
            print(f"start: {start.described(config)}")
        with clock.phase("train"):
            trainer.continue_from(start.checkpoint)
        if config.select == "best":
            trainer.accelerator.wait_for_everyone()
            restore_best(folder, trainer.trained_parameters())
        if is_main_process():
            save(model, encoder.tokenizer, config)
        after = judge("after")
        result = Result(
            config=config,
            trainable=sum(p.numel() for p in trainer.trained_parameters().values()),
            steps=trainer.state.global_step,
            before=before,
            after=after,
            losses=trainer.losses(),
            seconds=clock.seconds,
            epochs=epoch_values(folder) if config.evaluate_every else {},
        )
        if is_main_process():
            write_json(folder / "result.json", result.to_dict())
        trainer.accelerator.wait_for_everyone()
    return model, encoder, result


@dataclass(frozen=True)
class Start:
    """What a run finds in its output folder.

    Args:
        checkpoint: the newest one, to resume from.
        adapter: the adapter in the folder, initial or trained.
        replaces: how the run differs from an earlier one, without results, that it replaces.
    """

    checkpoint: Path | None = None
    adapter: Path | None = None
    replaces: str | None = None

    def described(self, config: TrainConfig) -> str:
        """Where the run starts from, in words."""
        if self.checkpoint is not None:
            return f"{self.checkpoint.name} of {config.output_dir}"
        if config.method not in ADAPTER_METHODS:
            new = f"{config.model}, method {config.method}"
        elif self.adapter is not None:
            return f"the adapter found in {self.adapter}"
        else:
            new = f"a new adapter, method {config.method}"
        return new if self.replaces is None else f"{new}; {self.replaces}, which had no checkpoint"


def find_start(folder: Path, config: TrainConfig, rows: Rows, processes: int) -> Start:
    """What the run begins with, checked.

    Raises:
        ConfigError: the folder holds results of another run, or what this one would overwrite.
        CheckpointError: a damaged checkpoint, or none left of a run that was trained.
    """
    replaces = difference(folder, config, rows)
    checkpoint = next(iter(reversed(checkpoints(folder))), None)
    if not (folder / "config.json").exists():
        written = [] if config.method in ADAPTER_METHODS else [trained_folder(config)]
        for path in (checkpoint, folder / "result.json", *written):
            if path is not None and path.exists():
                raise ConfigError(
                    f"output_dir {str(folder)!r} holds {path.name} and no config.json that says "
                    "of which run; expected another output_dir"
                )
    if checkpoint is not None:
        check(checkpoint, processes)
    elif (folder / "config.json").exists() and is_trained(folder):
        raise CheckpointError(
            f"{folder} holds what was trained and none of the checkpoints that led to it; "
            "expected them, or another output_dir"
        )
    if is_main_process():
        remove_remains(folder)
    adapter = folder / ADAPTER_FOLDER
    found = adapter.exists() and replaces is None
    return Start(checkpoint, adapter if found else None, replaces)


def judged(
    model: nn.Module,
    encoder: Encoder,
    config: TrainConfig,
    rows: Rows,
    name: str,
    metric: str | None = None,
) -> float:
    """A metric of `model` on held-out rows.

    As in training, what is trained is fp32 and computes in the dtype of the weights.

    Args:
        model, encoder: of the run.
        config: the run, for its settings of evaluation.
        rows: what is judged.
        name: of the rows, or of the moment, for the progress bar.
        metric: None for the run's.

    Raises:
        DataError: rows that the metric cannot judge.
    """
    metric = metric or config.evaluation
    check_rows(encoder, rows, metric)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, config.dtype == "bfloat16"):
        return evaluate(
            model,
            encoder,
            rows,
            metric,
            batch_size=config.eval_batch_size,
            max_new_tokens=config.max_new_tokens,
            progress=track(f"{metric} {name}") if is_main_process() else iter,
        )


def trained_folder(config: TrainConfig) -> Path:
    """Where `save` writes."""
    return Path(config.output_dir) / ("model" if config.method == "full" else ADAPTER_FOLDER)


def save(model: nn.Module, tokenizer, config: TrainConfig) -> None:
    """Saves the trained adapter, or for `full` the model, in `output_dir`."""
    if config.method in ADAPTER_METHODS:
        from lorasb_kernels import save_adapter

        save_adapter(model, trained_folder(config))
        return
    with atomic_folder(trained_folder(config)) as building:
        if config.method in changed_base.METHODS:
            changed_base.save_converted(model, building, Path(config.output_dir))
        else:
            model.save_pretrained(building)
        tokenizer.save_pretrained(building)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
