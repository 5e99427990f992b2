"""What a training run is: `TrainConfig`, read from a preset, a YAML or JSON file and flags."""

import dataclasses
import importlib.resources
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_kernels.config import INITS, SIGMA_SIDES, SPECTRAL_SCALINGS, InitFacts
from lorasb_kernels.init.estimation.options import STRATEGIES
from lorasb_kernels.train.errors import ConfigError, setting_errors
from lorasb_kernels.train.formats import FORMATS
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
ETA_RULES = ("first-step", "published")
DTYPES = ("float32", "bfloat16")
EVALUATIONS = {
    "causal-lm": ("loss", "numeric", "math", "answer", "choice"),
    "classification": ("accuracy", "matthews", "pearson"),
}
MAX_FILE_BYTES = 1 << 20
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a key of the file and a flag of `lorasb train`.

    Raises:
        ConfigError: at construction, for the first field that cannot be used.
    """

    model: str  # folder or hub id
    data: str  # a file or hub:<name>:<split>, in one of the forms of docs/training.md
    output_dir: str
    eval_data: str | None = None  # like `data`; None: no evaluation
    data_format: str | None = None  # of `data`; None: recognised by its fields
    data_limit: int | None = None  # rows of `data` to take, from its beginning; None: all
    task: str = "causal-lm"
    method: str = "lora-sb"
    r: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_alpha: float | None = None  # scaling is α/r; None: s = 1 for LoRA-SB, else α = r
    use_rslora: bool | None = None  # scaling is α/√r; None: for `rslora` and `lora-one`
    dropout: float = 0.0
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None  # of a classifier's new head; None: learning_rate
    optimizer: str | None = None  # None: preconditioned for `lora-one`, lora-pro for it, else adamw
    damping: float = 1e-6  # λ of the preconditioned optimizer
    schedule: str = "linear"
    warmup_ratio: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    batch_size: int = 16  # samples per device and forward pass
    accumulation: int = 1  # forward passes per step
    epochs: float = 1.0
    max_steps: int | None = None  # overrides `epochs`
    max_length: int = 512  # tokens
    max_cut_share: float = 0.1  # of the rows, that `max_length` may cut or leave out
    template: str | None = None  # prompts of a paper's code; None: the chat template's, or plain
    system_prompt: str | None = None  # None: the chat template's own
    response_prefix: str | None = None  # the answer's first words in evaluation; None: template's
    stop: tuple[str, ...] | None = None  # texts that end a generated answer; None: template's
    batching: str = "length-grouped"
    init_share: float = 1e-3  # of the training samples, for LoRA-SB's update estimate
    init_minimum: int = 32  # samples, when the share is fewer
    init_batch_size: int | None = None  # samples per forward pass of it; None: batch_size
    init_learning_rate: float | None = None  # η of LoRA-SB; None: by eta_rule
    eta_rule: str = "first-step"  # of the schedule, or "published": as the public code counts steps
    init_from: str | None = (
        None  # saved adapter whose tensors replace those of equal name and shape
    )
    init_strategy: str = "auto"  # of estimating gradients: resident, layerwise, grouped
    init_memory_budget: int | None = None  # bytes for it; None: half of what is free
    gamma: float = 128.0  # γ of `lora-one`
    spectral_scaling: str = "relative"  # of `lora-one`: √(S/S₁)/√γ, or "absolute": √γ·√S
    noise_std: float = 1e-5  # of `noise`
    sigma_side: str = "B"  # of `lora-xs`: the factor that carries Σ
    core_std: float = 1e-5  # of `lora-xs` and `random-ab`: of the initial R
    optimal_gradient: bool = False  # of the core, for an A or B that is not orthonormal
    orthonormalize: bool = False  # A and B, their triangles into the core: for any optimizer
    dtype: str = "float32"  # of the frozen weights; what is trained stays float32
    gradient_checkpointing: bool = False
    backend: str = "auto"
    evaluation: str | None = None  # None: loss or accuracy, by task
    evaluate_every: str | None = None  # "epoch": also after each; None: at the end
    select: str = "last"  # the epoch that is kept, or "best"
    eval_batch_size: int = 32
    max_new_tokens: int | None = None  # of a generated answer; None: by the metric
    save_steps: int = 100  # a checkpoint every this many steps
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ()  # loggers of transformers' Trainer
    seed: int = 0

    def __post_init__(self):
        for name in ("report_to", "target_modules", "stop"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        with setting_errors():
            check_fields(self)
        self._one_of("task", TASKS)
        self._one_of("method", METHODS)
        if self.optimizer is None:
            own = {"lora-one": "preconditioned", "lora-pro": "lora-pro"}
            object.__setattr__(self, "optimizer", own.get(self.method, "adamw"))
        if self.use_rslora is None:
            object.__setattr__(self, "use_rslora", self.method in ("rslora", "lora-one"))
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("spectral_scaling", SPECTRAL_SCALINGS)
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
                stacklevel=3,
            )
        if self.data_format is not None:
            self._one_of("data_format", FORMATS)
        if self.template is not None:
            self._one_of("template", tuple(TEMPLATES))
            if self.system_prompt is not None:
                raise ConfigError(
                    f"system_prompt is given with template {self.template!r}; expected one of them"
                )
        if "" in (self.stop or ()):
            raise ConfigError("stop holds an empty text; expected texts that end an answer")
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
        if self.evaluate_every is not None:
            self._one_of("evaluate_every", ("epoch",))
        self._one_of("select", ("last", "best"))
        if self.select == "best" and self.evaluate_every is None:
            raise ConfigError("select is 'best'; expected evaluate_every: epoch")
        self._one_of("eta_rule", ETA_RULES)
        if self.eta_rule == "published" and not self.warmup_ratio:
            raise ConfigError("eta_rule is 'published'; expected a warmup_ratio above 0")
        self._one_of("sigma_side", SIGMA_SIDES)
        self._one_of("init_strategy", STRATEGIES)
        self._one_of("schedule", SCHEDULES)
        self._one_of("batching", BATCHING)
        self._one_of("dtype", DTYPES)
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", EVALUATIONS[self.task][0])
        self._one_of("evaluation", EVALUATIONS[self.task])
        if self.batching == "packed" and self.task == "classification":
            raise ConfigError("batching is 'packed'; classification needs 'length-grouped'")
        positive = ("r", "learning_rate", "batch_size", "accumulation", "epochs", "max_length")
        positive += ("init_minimum", "eval_batch_size", "max_new_tokens", "save_steps")
        positive += ("keep_checkpoints", "max_steps", "lora_alpha", "init_learning_rate")
        positive += ("damping", "gamma", "init_memory_budget", "data_limit", "init_batch_size")
        positive += ("head_learning_rate",)
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; expected a positive number")
        limits = {"dropout": 1, "warmup_ratio": 1, "weight_decay": math.inf}
        limits |= {"max_grad_norm": math.inf, "seed": 2**32, "max_cut_share": 1 + 1e-9}
        limits |= {"noise_std": math.inf, "core_std": math.inf}
        for name, upper in limits.items():
            if not 0 <= getattr(self, name) < upper:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 ≤ {name} < {upper}")
        if not 0 < self.init_share <= 1:
            raise ConfigError(f"init_share is {self.init_share}; expected 0 < init_share ≤ 1")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(
                f"{name} is {shown(getattr(self, name))}; expected one of {', '.join(choices)}"
            )

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


def fields() -> dict[str, dataclasses.Field]:
    """The settings by name."""
    return {field.name: field for field in dataclasses.fields(TrainConfig)}


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = importlib.resources.files(__package__) / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset, on top of those of the preset that it names itself.

    Raises:
        ConfigError: no such preset.
    """
    if name not in preset_names():
        raise ConfigError(f"preset is {shown(name)}; expected one of {', '.join(preset_names())}")
    file = importlib.resources.files(__package__) / "presets" / f"{name}.yaml"
    settings = _parse(file.read_text(encoding="utf-8"), f"preset {name}")
    base = settings.pop("preset", None)
    return settings if base is None else load_preset(base) | settings


def load_file(path: str | Path, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of a YAML or JSON file.

    Args:
        path: the file.
        also: keys it may have that are no settings.

    Raises:
        ConfigError: unreadable, not a mapping, or a key that is not a setting.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(
                f"config is {str(path)!r} of {size} bytes; expected at most {MAX_FILE_BYTES}"
            )
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config is {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config is {str(path)!r}, which is not UTF-8: {error}") from error
    return _parse(text, str(path), also)


def _parse(text: str, source: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    import yaml  # JSON is YAML too

    try:
        settings = yaml.load(text, Loader=_loader())
    except Exception as error:  # YAML's constructors raise whatever int(), datetime() … raise
        raise ConfigError(f"{source} is neither YAML nor JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} holds {type(settings).__name__}; expected a mapping")
    check_keys(settings, source, also)
    return settings


def _loader():
    """YAML's safe loader, which also reads `1e-4` as a number (YAML 1.1 requires `1.0e-4`)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def check_keys(settings: dict[str, Any], source: str, also: tuple[str, ...] = ()) -> None:
    """Refuses keys that are not settings.

    Raises:
        ConfigError: names the unknown keys and the known ones.
    """
    known = {*fields(), "preset", *also}
    unknown = sorted(shown(key).strip("'") for key in set(settings) - known)[:5]
    if unknown:
        raise ConfigError(
            f"{source}: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )


def resolve(*layers: dict[str, Any]) -> TrainConfig:
    """A configuration from layers of settings: later ones override, a `preset` comes first.

    Raises:
        ConfigError: an unknown key, a missing or unusable setting.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        check_keys(layer, "settings")
        merged |= layer
    preset = merged.pop("preset", None)
    if preset is not None:
        merged = load_preset(preset) | merged
    required = [name for name, field in fields().items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in merged]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}")
    return TrainConfig(**merged)
