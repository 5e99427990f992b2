"""What to adapt and how: `LoRASBConfig`, validated when it is built."""

import dataclasses
import math
import warnings
from dataclasses import InitVar, dataclass

from lorasb_kernels.ops.limits import BACKEND_CHOICES, MAX_RANK
from lorasb_kernels.utils.fields import check_fields

SIGMA_SIDES = ("B", "A")
SPECTRAL_SCALINGS = ("relative", "absolute")


@dataclass(frozen=True)
class InitFacts:
    """The facts about an initialization that do not depend on a model.

    Args:
        has_core: training changes only R; without a core it changes A and B.
        needs_gradients: A and B come from the gradients of samples, so that batches are needed.
        needs_eta: the core is a step of size η, which has to be given.
        alpha_is_r: its paper's scaling is α/r, with α = r by default.
        rebuilt: A and B follow from the frozen weight and the seed, and are not stored.
    """

    has_core: bool = True
    needs_gradients: bool = False
    needs_eta: bool = False
    alpha_is_r: bool = False
    rebuilt: bool = False


INITS = {
    "lora-sb": InitFacts(needs_gradients=True, needs_eta=True),
    "lora-sb-sgd": InitFacts(needs_gradients=True, needs_eta=True),
    "lora-xs": InitFacts(alpha_is_r=True, rebuilt=True),
    "random-ab": InitFacts(alpha_is_r=True),
    "orthogonal": InitFacts(),
    "noise": InitFacts(needs_gradients=True, needs_eta=True),
    "kaiming-svd": InitFacts(),
    "scaled-b": InitFacts(needs_gradients=True, needs_eta=True),
    "lora": InitFacts(has_core=False, alpha_is_r=True),
    "lora-one": InitFacts(has_core=False, needs_gradients=True, alpha_is_r=True),
}


@dataclass(frozen=True)
class LoRASBConfig:
    """Configuration of the adapters of one model.

    Args:
        r: rank, 1 … 512.
        target_modules: which linear layers to adapt: `"all-linear"` (every one that can be
            adapted, except the heads), a tuple of name suffixes, or a regular expression that a
            layer's full name must match.
        init: `"lora-sb"` (truncated SVD of the sign of the first update, arXiv:2411.19557),
            `"lora-xs"` (truncated SVD of the weight, arXiv:2405.17604), `"orthogonal"`
            (random orthonormal A and B, R = 0), or, training A and B without a core, `"lora"`
            (Kaiming-uniform A, B = 0, arXiv:2106.09685) or `"lora-one"` (truncated SVD of the
            negative gradient, arXiv:2502.01235). For ablations, LoRA-SB with another start:
            `"lora-sb-sgd"` (the first update of plain gradient descent, without the sign),
            `"noise"` (ΔW plus noise), `"kaiming-svd"` (a Kaiming-uniform matrix for ΔW) and
            `"scaled-b"` (the same B·R·A with B = U S, R = 1/s: B is not orthonormal); LoRA-XS
            with another start: `"random-ab"` (Kaiming-uniform A and B).
        scaling: s of the adapter `s·B·R·A`, finite and not 0.
        lora_alpha: α; when given, s = α/r and `scaling` must not be given.
        use_rslora: s = α/√r instead (arXiv:2312.03732).
        dropout: probability that an element of the adapter's input is dropped, in [0, 1).
        backend: kernels to run, `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
        optimal_gradient: replace the gradient of R by the optimal one for any full-rank
            A, B and any s (LoRA-SB theorem 3). That changes plain gradient descent. Adam does not
            notice a gradient whose elements are scaled by positive numbers: with diagonal AAᵀ and
            BᵀB, as `"lora-xs"` and `"scaled-b"` have, it trains the same with and without.
        orthonormalize: after the initialization, replace A and B by orthonormal factors of the
            same row and column space (QR) and multiply R by the triangular factors: the same
            adapter, whose plain gradient is the optimal one up to s² under any optimizer.
        modules_to_save: name suffixes of modules trained whole, such as a classification head.
        share_inputs: fuse sibling layers that read the same input (q, k, v; gate, up).
        sigma_side: the factor that carries Σ for `"lora-xs"`, `"B"` or `"A"`.
        core_std: standard deviation of the initial R for `"lora-xs"` and `"random-ab"`.
        noise_std: standard deviation of the noise added to ΔW for `"noise"`.
        gamma: γ of `"lora-one"`.
        spectral_scaling: the factor that `"lora-one"` puts on each of A and B from the singular
            values S: `"relative"`, √(S/S₁)/√γ, or `"absolute"`, √γ·√S.
        seed: seed of every random draw of the initialization.
        lora_dropout: peft's name of `dropout`.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field outside its range.
    """

    r: int
    target_modules: str | tuple[str, ...] = "all-linear"
    init: str = "lora-sb"
    scaling: float = 1.0
    lora_alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    backend: str = "auto"
    optimal_gradient: bool = False
    orthonormalize: bool = False
    modules_to_save: tuple[str, ...] = ()
    share_inputs: bool = False
    sigma_side: str = "B"
    core_std: float = 1e-5
    noise_std: float = 1e-5
    gamma: float = 128.0
    spectral_scaling: str = "relative"
    seed: int = 0
    lora_dropout: InitVar[float | None] = None

    def __post_init__(self, lora_dropout):
        if lora_dropout is not None:
            object.__setattr__(self, "dropout", lora_dropout)
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check_fields(self)
        self._check_ranges()
        if self.init == "lora-sb" and self.lora_alpha is not None and self.s != 1:
            warnings.warn(
                f"lora_alpha is {self.lora_alpha:g}, so the scaling of lora-sb is {self.s:g}; its "
                "paper trains with 1, as without lora_alpha",
                stacklevel=3,
            )

    @property
    def s(self) -> float:
        """The adapter's scaling: α/r (α/√r) when `lora_alpha` is given, else `scaling`."""
        if self.lora_alpha is None:
            return self.scaling
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def facts(self) -> InitFacts:
        """What `init` trains and what it needs."""
        return INITS[self.init]

    def _check_ranges(self) -> None:
        choices = {"init": INITS, "backend": BACKEND_CHOICES, "sigma_side": SIGMA_SIDES}
        choices |= {"spectral_scaling": SPECTRAL_SCALINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        if not 1 <= self.r <= MAX_RANK:
            raise ValueError(f"r is {self.r}; expected 1 <= r <= {MAX_RANK}")
        if not self.target_modules:
            raise ValueError("target_modules is empty; expected at least one name")
        if self.lora_alpha is not None and self.scaling != 1.0:
            raise ValueError(
                f"scaling is {self.scaling} and lora_alpha is {self.lora_alpha}; "
                "expected one of them, as lora_alpha means a scaling of lora_alpha / r"
            )
        if self.use_rslora and self.lora_alpha is None:
            raise ValueError("use_rslora is True; expected lora_alpha, as s is then α / √r")
        for name in ("optimal_gradient", "orthonormalize"):
            if getattr(self, name) and not self.facts.has_core:
                raise ValueError(
                    f"{name} is True; expected False, as init={self.init!r} trains no core"
                )
        if not math.isfinite(self.s) or self.s == 0:
            name = "scaling" if self.lora_alpha is None else "lora_alpha"
            raise ValueError(f"{name} is {getattr(self, name)}; expected finite and not 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")
        for name in ("core_std", "noise_std"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number >= 0")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; expected a finite number > 0")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected seed >= 0")

    def to_dict(self) -> dict:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "LoRASBConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown or missing field.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"fields is a {type(fields).__name__}; expected a dict")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown fields {unknown}; expected some of {sorted(known)}")
        if "r" not in fields:
            raise ValueError("field 'r' is missing")
        return cls(**fields)


__all__ = ["INITS", "SPECTRAL_SCALINGS", "InitFacts", "LoRASBConfig"]
