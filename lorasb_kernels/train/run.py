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
from lorasb_kernels.train.methods import ADAPTER_FOLDER, prepare, save_start
from lorasb_kernels.train.output_folder import (
    checkpoints,
    claim,
    is_claimed,
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
    regression = config.regression
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
        print(message)
    return samples


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
    written, and the trained adapter is saved before it is evaluated.

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
        ConfigError: a setting that does not fit the model; `output_dir` holds a run with other
            settings, an adapter that the settings do not describe, or is another process's.
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
        checkpoint = find_start(folder, config, train_rows, arguments.world_size)
        with clock.phase("load"):
            with setting_errors(f"model is {config.model!r}: "):
                model, tokenizer = load_model(config, train_rows)
            encoder = make_encoder(config, tokenizer)
            samples = encode(encoder, config, train_rows, "training")
            if not samples:
                fits = f"max_length = {config.max_length} tokens"
                raise DataError(f"no training row fits into {fits}")
            if is_main_process():
                console.print(preview(tokenizer, samples[0], train_rows[0]))
            check_rows(encoder, eval_rows, config.evaluation)
            if eval_rows and config.evaluation not in (*WRITTEN, "choice"):
                encode(encoder, config, eval_rows, "evaluation")
        model.to(arguments.device)
        packed = config.batching == "packed"
        if packed or max(config.batch_size, config.eval_batch_size) > 1:
            check_separation(model, samples, encoder.pad_token_id, packed)

        def judge(when: str) -> float | None:
            with clock.phase("evaluate"):
                return judged(model, encoder, eval_rows, config, when) if eval_rows else None

        before = judge("before") if judge_before else None
        found = (folder / ADAPTER_FOLDER).exists()
        batched = pack(samples, config.max_length) if packed else samples
        with clock.phase("initialize"):
            eta = initial_step(config, arguments, len(batched))
            model = prepare(
                model, config, samples, tokenizer.pad_token_id, eta, progress=is_main_process()
            )
        bars = [TrainingBar(config.method)] if is_main_process() else []
        with setting_errors():
            trainer = AdapterTrainer(
                config,
                model=model,
                train_dataset=batched,
                data_collator=Collator(tokenizer.pad_token_id),
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
            claim(folder, config, train_rows)
            if not found:
                save_start(model, config)
            print(f"start: {start_of(config, checkpoint, found)}")
        with clock.phase("train"):
            trainer.continue_from(checkpoint)
        if config.select == "best":
            trainer.accelerator.wait_for_everyone()
            restore_best(folder, trainer.trained_parameters())
        if is_main_process():
            save(model, tokenizer, config)
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


def find_start(folder: Path, config: TrainConfig, rows: Rows, processes: int) -> Path | None:
    """The newest checkpoint of the run in `folder`, checked; None for a run without.

    Raises:
        ConfigError: the folder holds another run, or what this one would overwrite.
        CheckpointError: a damaged checkpoint, or none left of a run that was trained.
    """
    claimed = is_claimed(folder, config, rows)
    checkpoint = next(iter(reversed(checkpoints(folder))), None)
    if not claimed:
        written = [] if config.method in ADAPTER_METHODS else [trained_folder(config)]
        for path in (checkpoint, folder / "result.json", *written):
            if path is not None and path.exists():
                raise ConfigError(
                    f"output_dir {str(folder)!r} holds {path.name} and no config.json that says "
                    "of which run; expected another output_dir"
                )
    if checkpoint is not None:
        check(checkpoint, processes)
    elif (folder / "result.json").exists():
        raise CheckpointError(
            f"{folder} holds a trained adapter and none of the checkpoints that led to it; "
            "expected them, or another output_dir"
        )
    if is_main_process():
        remove_remains(folder)
    return checkpoint


def start_of(config: TrainConfig, checkpoint: Path | None, found: bool) -> str:
    """Where a run starts from, in words."""
    if checkpoint is not None:
        return f"{checkpoint.name} of {config.output_dir}"
    if config.method not in ADAPTER_METHODS:
        return f"{config.model}, method {config.method}"
    adapter = trained_folder(config)
    return f"the adapter found in {adapter}" if found else f"a new adapter, method {config.method}"


def judged(model: nn.Module, encoder: Encoder, rows: Rows, config: TrainConfig, when: str) -> float:
    """The metric of `model` on held-out rows.

    As in training, what is trained is fp32 and computes in the dtype of the weights.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, config.dtype == "bfloat16"):
        return evaluate(
            model,
            encoder,
            rows,
            config.evaluation,
            batch_size=config.eval_batch_size,
            max_new_tokens=config.max_new_tokens,
            progress=track(f"{config.evaluation} {when}") if is_main_process() else iter,
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
