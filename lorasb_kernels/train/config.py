"""What a training run is: `TrainConfig`."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorasb_kernels.config import INITS, SIGMA_SIDES, SPECTRAL_SCALINGS, InitFacts
from lorasb_kernels.init.estimation.options import STRATEGIES
from lorasb_kernels.train.errors import ConfigError, setting_errors
from lorasb_kernels.train.formats import FORMATS
from lorasb_kernels.train.setting import (
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    UP_TO_1,
    check_choices,
    check_ranges,
    setting,
)
from lorasb_kernels.train.templates import TEMPLATES
from lorasb_kernels.utils.fields import check_fields, shown

TASKS = ("causal-lm", "classification")
# rslora: lora with a scaling of α/√r; lora-pro: lora with its own optimizer.
ADAPTER_METHODS = (*INITS, "rslora", "lora-pro")
PEFT_METHODS = ("pissa", "dora", "lora-ga", "vera")
METHODS = (*ADAPTER_METHODS, *PEFT_METHODS, "full")
# Of the factors A and B: LoRA-One's and LoRA-Pro's.
FACTOR_OPTIMIZERS = ("preconditioned", "lora-pro")
OPTIMIZERS = ("adamw", *FACTOR_OPTIMIZERS)
SCHEDULES = ("linear", "cosine", "constant")
BATCHING = ("length-grouped", "random", "packed")
INIT_SAMPLES = ("auto", "share")
ETA_RULES = ("first-step", "published")
DTYPES = ("float32", "bfloat16")
EVALUATIONS = {
    "causal-lm": ("loss", "numeric", "math", "answer", "choice"),
    "classification": ("accuracy", "matthews", "pearson"),
}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_run = partial(setting, "Model, data and output")
_prompt = partial(setting, "Prompts")
_method = partial(setting, "Method")
_start = partial(setting, "Initialization")
_step = partial(setting, "Optimization")
_batch = partial(setting, "Batches")
_judging = partial(setting, "Evaluation")
_keeping = partial(setting, "Checkpoints and logs")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a key of the file and a flag of `lorasb train`;
    docs/settings.md describes them.

    Raises:
        ConfigError: at construction, for the first field that cannot be used.
    """

    model: str = _run("folder or hub id of the model")
    data: str = _run("a file, or hub:<name>:<split>; see the forms under data_format")
    output_dir: str = _run("folder for checkpoints, adapter and results")
    eval_data: str | None = _run("like data; unset: no evaluation", None)
    data_format: str | None = _run(
        "form of the rows of data; unset: recognised by the fields of the first",
        None,
        choices=FORMATS,
    )
    data_limit: int | None = _run(
        "rows of data to take, from its beginning; unset: all", None, range=POSITIVE
    )
    task: str = _run("what the model does", "causal-lm", choices=TASKS)
    dtype: str | None = _run(
        "of the frozen weights, what is trained stays float32; unset: bfloat16 on a GPU that has "
        "it, else float32",
        None,
        choices=DTYPES,
    )
    seed: int = _run("of everything random", 0, range=SEED)

    method: str = _method("what is trained", "lora-sb", choices=METHODS)
    r: int = _method("rank of the adapters", 16, range=POSITIVE)
    target_modules: str | tuple[str, ...] = _method(
        "layers to adapt: all-linear, names (of the last part), or one regular expression",
        "all-linear",
    )
    lora_alpha: float | None = _method(
        "α; the scaling s is α/r. Unset: s = 1 for methods with a core, else α = r",
        None,
        range=POSITIVE,
    )
    use_rslora: bool | None = _method("whether s is α/√r; unset: for rslora and lora-one", None)
    dropout: float = _method("of the adapters' input, while training", 0.0, range=BELOW_1)
    gamma: float = _method("γ of lora-one", 128.0, range=POSITIVE)
    spectral_scaling: str = _method(
        "of lora-one: √(S/S₁)/√γ or √γ·√S", "relative", choices=SPECTRAL_SCALINGS
    )
    noise_std: float = _method("of method noise", 1e-5, range=NOT_NEGATIVE)
    sigma_side: str = _method("of lora-xs: the factor that carries Σ", "B", choices=SIGMA_SIDES)
    core_std: float = _method(
        "of lora-xs and random-ab: of the initial R", 1e-5, range=NOT_NEGATIVE
    )
    orthonormalize: bool = _method(
        "orthonormal A and B, their triangles into the core: for any optimizer", False
    )
    optimal_gradient: bool = _method(
        "of the core, for A and B that are not orthonormal; under AdamW it changes next to nothing",
        False,
    )
    backend: str = _method("of the adapters' operators: auto, reference, triton or cuda", "auto")

    init_samples: str | None = _start(
        "how many samples LoRA-SB's update is estimated from: auto measures how noisy their "
        "gradients are, share takes init_share. Unset: share if that or init_minimum is given, "
        "else auto",
        None,
        choices=INIT_SAMPLES,
    )
    init_share: float | None = _start(
        "share of the training samples; unset: 0.001", None, range=SHARE
    )
    init_minimum: int | None = _start(
        "samples, where the share is fewer; unset: 32", None, range=POSITIVE
    )
    init_batch_size: int | None = _start(
        "samples per forward pass; unset: batch_size", None, range=POSITIVE
    )
    init_learning_rate: float | None = _start(
        "η of LoRA-SB; unset: by eta_rule", None, range=POSITIVE
    )
    eta_rule: str = _start(
        "η is the schedule's first learning rate, or counted as the published code does",
        "first-step",
        choices=ETA_RULES,
    )
    init_from: str | None = _start(
        "saved adapter whose tensors replace those of equal name and shape", None
    )
    init_strategy: str = _start("how gradients are estimated", "auto", choices=STRATEGIES)
    init_memory_budget: int | None = _start(
        "bytes for that; unset: half of what is free", None, range=POSITIVE
    )

    learning_rate: float = _step("peak of the schedule", 1e-3, range=POSITIVE)
    head_learning_rate: float | None = _step(
        "of a classifier's new head; unset: learning_rate", None, range=POSITIVE
    )
    optimizer: str | None = _step(
        "unset: preconditioned for lora-one, lora-pro for lora-pro, else adamw",
        None,
        choices=OPTIMIZERS,
    )
    damping: float = _step("λ of the preconditioned optimizer", 1e-6, range=POSITIVE)
    schedule: str = _step("of the learning rate, after the warm-up", "linear", choices=SCHEDULES)
    warmup_ratio: float = _step("share of the steps that warm up", 0.02, range=BELOW_1)
    weight_decay: float = _step("of AdamW", 0.0, range=NOT_NEGATIVE)
    max_grad_norm: float = _step("gradients are clipped to it; 0: not", 1.0, range=NOT_NEGATIVE)
    epochs: float = _step("passes over the data", 1.0, range=POSITIVE)
    max_steps: int | None = _step("overrides epochs", None, range=POSITIVE)

    batch_size: int = _batch("samples per device and forward pass", 16, range=POSITIVE)
    accumulation: int = _batch("forward passes per step", 1, range=POSITIVE)
    max_length: int = _batch("tokens of a sample", 512, range=POSITIVE)
    max_cut_share: float = _batch(
        "share of the rows that max_length may cut or leave out", 0.1, range=UP_TO_1
    )
    batching: str = _batch(
        "samples of a step have similar lengths, or are random, or share sequences",
        "length-grouped",
        choices=BATCHING,
    )
    gradient_checkpointing: bool = _batch("less memory for a second forward pass", False)

    template: str | None = _prompt(
        "prompts of a paper's code; unset: the chat template's, or plain",
        None,
        choices=tuple(TEMPLATES),
    )
    system_prompt: str | None = _prompt("unset: the chat template's own", None)
    response_prefix: str | None = _prompt(
        "the answer's first words in evaluation; unset: the template's", None
    )
    stop: tuple[str, ...] | None = _prompt(
        "texts that end a generated answer; unset: the template's", None
    )

    evaluation: str | None = _judging(
        "metric: loss, numeric, math, answer, choice; of classifiers accuracy, matthews, pearson. "
        "Unset: loss or accuracy",
        None,
    )
    evaluate_every: str | None = _judging(
        "also after each epoch; unset: at the end", None, choices=("epoch",)
    )
    select: str = _judging("the epoch that is kept", "last", choices=("last", "best"))
    eval_batch_size: int = _judging("samples per forward pass", 32, range=POSITIVE)
    max_new_tokens: int | None = _judging(
        "of a generated answer; unset: by the metric", None, range=POSITIVE
    )

    save_steps: int = _keeping("a checkpoint every this many steps", 100, range=POSITIVE)
    keep_checkpoints: int = _keeping("how many are kept", 2, range=POSITIVE)
    report_to: tuple[str, ...] = _keeping("loggers of transformers' Trainer", ())

    def __post_init__(self):
        for name in ("report_to", "target_modules", "stop"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        with setting_errors():
            check_fields(self)
        check_choices(self)
        check_ranges(self)
        self._fill_in()
        self._check_method()
        self._check_prompts()
        self._check_evaluation()
        if self.batching == "packed" and self.task == "classification":
            raise ConfigError("batching is 'packed'; classification needs 'length-grouped'")
        if self.eta_rule == "published" and not self.warmup_ratio:
            raise ConfigError("eta_rule is 'published'; expected a warmup_ratio above 0")

    def _fill_in(self) -> None:
        """What follows from other settings where it is not given."""
        own = {"lora-one": "preconditioned", "lora-pro": "lora-pro"}
        rslora = self.method in ("rslora", "lora-one")
        by_share = self.init_share is not None or self.init_minimum is not None
        derived = {
            "init_samples": lambda: "share" if by_share else "auto",
            "init_share": lambda: 1e-3,
            "init_minimum": lambda: 32,
            "optimizer": lambda: own.get(self.method, "adamw"),
            "use_rslora": lambda: rslora,
            "evaluation": lambda: EVALUATIONS[self.task][0],
            "dtype": lambda: "bfloat16" if _gpu_has_bfloat16() else "float32",
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value())

    def _check_method(self) -> None:
        facts = self.init_facts
        if self.optimizer in FACTOR_OPTIMIZERS and (facts is None or facts.has_core):
            training_a_and_b = [name for name, facts in INITS.items() if not facts.has_core]
            raise ConfigError(
                f"optimizer is {self.optimizer!r} and method {self.method!r}; expected a method "
                f"that trains A and B here: {', '.join(training_a_and_b)}, rslora, lora-pro"
            )
        without_alpha = facts is not None and not facts.alpha_is_r and self.lora_alpha is None
        if self.use_rslora and without_alpha:
            raise ConfigError("use_rslora is true; expected lora_alpha, as s is then α / √r")
        for name in ("optimal_gradient", "orthonormalize"):
            if getattr(self, name) and (facts is None or not facts.has_core):
                raise ConfigError(
                    f"{name} is true and method {self.method!r}; expected a method that "
                    "trains a core"
                )
        if self.optimal_gradient:
            warnings.warn(
                "optimal_gradient is true, but AdamW trains the cores and hardly notices it, and "
                "not at all where AAᵀ and BᵀB are diagonal (lora-xs, scaled-b); orthonormalize: "
                "true has the same aim and works under any optimizer",
                stacklevel=4,
            )
        if self.head_learning_rate is not None and (
            self.task != "classification" or self.optimizer in FACTOR_OPTIMIZERS
        ):
            raise ConfigError(
                "head_learning_rate is given; expected task classification and optimizer adamw"
            )
        if self.init_from is not None and facts is None:
            raise ConfigError(
                f"init_from is given with method {self.method!r}; expected one of "
                f"{', '.join(ADAPTER_METHODS)}"
            )

    def _check_prompts(self) -> None:
        if self.template is not None and self.system_prompt is not None:
            raise ConfigError(
                f"system_prompt is given with template {self.template!r}; expected one of them"
            )
        if "" in (self.stop or ()):
            raise ConfigError("stop holds an empty text; expected texts that end an answer")

    def _check_evaluation(self) -> None:
        if self.evaluation not in EVALUATIONS[self.task]:
            raise ConfigError(
                f"evaluation is {shown(self.evaluation)}; expected one of "
                f"{', '.join(EVALUATIONS[self.task])}"
            )
        if self.select == "best" and self.evaluate_every is None:
            raise ConfigError("select is 'best'; expected evaluate_every: epoch")

    @property
    def adapter_init(self) -> str | None:
        """The `init` of a `LoRASBConfig` for this method; None if it uses no such adapter."""
        if self.method not in ADAPTER_METHODS:
            return None
        return "lora" if self.method in ("rslora", "lora-pro") else self.method

    @property
    def init_facts(self) -> InitFacts | None:
        """What that `init` trains and what it needs."""
        return None if self.adapter_init is None else INITS[self.adapter_init]

    @property
    def regression(self) -> bool:
        """Whether a classifier has one output, a score."""
        return self.evaluation == "pearson"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def fields() -> dict[str, dataclasses.Field]:
    """The settings by name."""
    return {field.name: field for field in dataclasses.fields(TrainConfig)}
