"""transformers' Trainer, with atomic checkpoints that hold only what is trained.

    output_dir/adapter/              A and B, once; for LoRA variants the initial factors
    output_dir/checkpoint-<step>/    trained.safetensors, optimizer, scheduler, RNG, history,
                                     and a manifest of their digests

A checkpoint is written to a temporary folder in the same place and then renamed, and it is renamed
before it is deleted, so every `checkpoint-<step>` is complete.
"""

import math
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)

from lorasb_kernels.optim import LoRAProAdamW, PreconditionedAdamW, split_parameters
from lorasb_kernels.train.batching import LengthGroupedSampler
from lorasb_kernels.train.checkpoint import load_state, save_state, seal
from lorasb_kernels.train.config import FACTOR_OPTIMIZERS, TrainConfig
from lorasb_kernels.train.errors import DivergedError
from lorasb_kernels.train.loss import token_losses
from lorasb_kernels.train.methods import heads
from lorasb_kernels.train.output_folder import STAGING, checkpoints
from lorasb_kernels.utils.files import write_tensors


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The settings of the run as transformers' `TrainingArguments`."""
    return TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_scheduler(config.schedule),
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=config.seed,
        disable_tqdm=True,
    )


def _scheduler(name: str) -> str:
    return "constant_with_warmup" if name == "constant" else name


class AdapterTrainer(Trainer):
    """Trains what requires grad. Samples are `Encoded`, batches come from `Collator`.

    Args:
        config: the run.
        model, train_dataset, data_collator, callbacks: as for transformers' Trainer.
    """

    def __init__(self, config: TrainConfig, **arguments):
        super().__init__(args=training_arguments(config), **arguments)
        self.config = config
        if config.task == "causal-lm":  # `compute_loss` divides by the labels of the whole step
            self.model_accepts_loss_kwargs = True
        self._staging: Path | None = None
        self.add_callback(_StopAtNonFinite())
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the labelled tokens of the whole step (the batch, for classifiers)."""
        if self.config.task == "classification":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, _ = token_losses(model, inputs)
        # Data-parallel training averages gradients; the count is already over all ranks.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.config.batching != "random"  # samples of one length are not grouped
        lengths = [len(sample.input_ids) if grouped else 1 for sample in dataset]
        sampler = LengthGroupedSampler(lengths, samples_per_step(self.args), self.args.seed)
        self.add_callback(_EpochOfSampler(sampler))
        return sampler

    def create_optimizer(self, model=None):
        """AdamW of transformers, or one of this library's for A and B."""
        if self.optimizer is None and self.config.optimizer in FACTOR_OPTIMIZERS:
            model = self.model if model is None else model
            options = {
                "lr": self.config.learning_rate,
                "weight_decay": self.config.weight_decay,
                "damping": self.config.damping,
            }
            if self.config.optimizer == "lora-pro":
                options["scaling"] = model.lorasb_config.s
                self.optimizer = LoRAProAdamW(*split_parameters(model), **options)
            else:
                self.optimizer = PreconditionedAdamW(*split_parameters(model), **options)
        optimizer = super().create_optimizer(model)
        if self.config.head_learning_rate is not None:
            give_heads_their_rate(optimizer, self.model, self.config.head_learning_rate)
        return optimizer

    def continue_from(self, checkpoint: Path | None) -> None:
        """Trains what `checkpoint` (None: nothing yet) leaves to do of the run; maybe nothing.

        transformers' `train` does at least one step, also from the last checkpoint of a run.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def losses(self) -> list[tuple[int, float]]:
        """The loss of every step so far, also of those before a checkpoint."""
        return [(log["step"], log["loss"]) for log in self.state.log_history if "loss" in log]

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The tensors that training changes, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self.args.output_dir)
        self._staging = output_dir / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (written,) = self._staging.iterdir()
                seal(written, self.args.world_size)
                written.rename(output_dir / written.name)
                for old in checkpoints(output_dir)[: -self.config.keep_checkpoints]:
                    old.rename(self._staging / old.name)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _get_output_dir(self, trial):
        return str(self._staging or self.args.output_dir)

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            write_tensors(Path(output_dir) / "trained.safetensors", self.trained_parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = load_file(Path(resume_from_checkpoint) / "trained.safetensors")
        own = self.trained_parameters()
        if saved.keys() != own.keys():
            different = sorted(saved.keys() ^ own.keys())
            raise ValueError(f"{resume_from_checkpoint} trains other parameters: {different[:5]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save:
            save_state(Path(output_dir) / "optimizer.safetensors", self.optimizer.state_dict())
            save_state(Path(output_dir) / "scheduler.safetensors", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer.safetensors"))
            self.lr_scheduler.load_state_dict(
                load_state(Path(checkpoint) / "scheduler.safetensors")
            )

    def _rng_file(self, folder) -> Path:
        return Path(folder) / f"rng-{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir):
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002, transformers draws from it
        state = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        save_state(self._rng_file(output_dir), state)

    def _load_rng_state(self, checkpoint):
        if checkpoint is None:
            return
        state = load_state(self._rng_file(checkpoint))
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class _StopAtNonFinite(TrainerCallback):
    """Ends the run at the first loss or gradient that is not finite, before it is saved."""

    def on_log(self, args, state, control, logs, **_):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}; expected a finite "
                    "number. Checkpoints of earlier steps are kept; a lower learning_rate or a "
                    "longer warm-up may help, in another output_dir"
                )


class _EpochOfSampler(TrainerCallback):
    """Sets the sampler's epoch, also if a resumed data loader hides the sampler from accelerate."""

    def __init__(self, sampler: LengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.set_epoch(int(state.epoch))


def give_heads_their_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float
) -> None:
    """Moves the trained parameters of a model's heads into groups with their own learning rate."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = (base.get_submodule(name) for name in heads(base))
    of_heads = {id(p) for module in modules for p in module.parameters()}
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in of_heads]
        if chosen:
            group["params"] = [p for p in group["params"] if id(p) not in of_heads]
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})


def samples_per_step(args: TrainingArguments) -> int:
    """Samples of one optimizer step, over all devices and forward passes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def initial_step(config: TrainConfig, args: TrainingArguments, samples: int) -> float:
    """η of LoRA-SB: as configured, else by `eta_rule`.

    `first-step` is the schedule's first learning rate above 0. `published` is the public code's
    learning_rate / (warmup_ratio · steps), which counts a step per batch of the estimation.
    """
    if config.init_learning_rate is not None:
        return config.init_learning_rate
    if config.eta_rule == "published":
        steps = config.epochs * math.ceil(samples / (config.init_batch_size or config.batch_size))
        return config.learning_rate / (config.warmup_ratio * steps)
    batches = math.ceil(samples / (args.train_batch_size * args.world_size))
    steps = math.ceil(config.epochs * math.ceil(batches / config.accumulation))
    warmup = args.get_warmup_steps(config.max_steps or steps)
    return config.learning_rate / max(1, warmup)
