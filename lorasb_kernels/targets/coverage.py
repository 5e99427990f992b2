"""How much of a model an adapter covers, and what is left out and why.

Counted are the matrix weights: those of linear layers, and other parameters of two or three
dimensions, such as the experts of a mixture [E, m, n]. Not counted are embeddings, convolutions,
biases, what is broadcast (a dimension of 1), the heads, and modules that are trained whole.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lorasb_kernels.linear_layers import is_linear, matrix_shape
from lorasb_kernels.targets.heads import head_modules
from lorasb_kernels.targets.names import is_inside

NOT_SELECTED = "not selected"
TWO_DIMENSIONS = "a parameter of two dimensions, of no linear layer"
THREE_DIMENSIONS = "a parameter of three dimensions, of no linear layer"
_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


class CoverageWarning(UserWarning):
    """ "all-linear" left out a part of the model."""


@dataclass(frozen=True)
class Skipped:
    """Matrix weights of one kind that are not adapted, for one reason.

    Args:
        kind: class of the layers, or of the module and the name of its parameter.
        reason: why.
        names: full names.
        weights: elements.
    """

    kind: str
    reason: str
    names: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Coverage:
    """Elements of the matrix weights that are adapted, of all, and those that are not.

    `str()` gives a line with the share that is adapted, and one for each kind that is not.
    """

    adapted: int
    total: int
    skipped: tuple[Skipped, ...]

    @property
    def share(self) -> float:
        """The share of the matrix weights that is adapted, 0 … 1."""
        return self.adapted / max(self.total, 1)

    @property
    def leaves_out_experts(self) -> bool:
        """Whether a parameter of three dimensions, as the experts of a mixture, is not adapted."""
        return any(group.reason == THREE_DIMENSIONS for group in self.skipped)

    def __str__(self) -> str:
        lines = [f"coverage: {self.share:.1%} of {self.total:,} matrix weights are adapted"]
        for group in self.skipped:
            share = group.weights / self.total
            lines.append(
                f"not adapted: {len(group.names)} {group.kind} ({share:.1%}), such as "
                f"{group.names[0]}: {group.reason}"
            )
        return "\n".join(lines)


def coverage_of(
    model: nn.Module,
    adapted: Collection[str],
    reasons: Mapping[str, str],
    modules_to_save: tuple[str, ...] = (),
) -> Coverage:
    """The coverage of a plain or adapted model.

    Args:
        model: on any device, meta included.
        adapted: names of the layers that are adapted, or are going to be.
        reasons: why other linear layers are not; `NOT_SELECTED` for those not listed.
        modules_to_save: modules trained whole.
    """
    covered = total = 0
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, kind, weights, reason in _matrices(model, modules_to_save):
        total += weights
        if name in adapted:
            covered += weights
        else:
            group = (kind, reasons.get(name, reason))
            groups.setdefault(group, []).append((name, weights))
    skipped = [
        Skipped(kind, reason, tuple(name for name, _ in found), sum(count for _, count in found))
        for (kind, reason), found in groups.items()
    ]
    skipped.sort(key=lambda group: -group.weights)
    return Coverage(covered, total, tuple(skipped))


def _matrices(
    model: nn.Module, modules_to_save: tuple[str, ...]
) -> Iterator[tuple[str, str, int, str]]:
    """Name, kind, elements and why it is not adapted (if it is not) of each matrix weight."""
    left_out = head_modules(model)
    for module in model.modules():
        if isinstance(module, _NO_MATRICES):
            left_out |= {id(part) for part in module.modules()}
    counted = {id(p) for m in model.modules() if id(m) in left_out for p in m.parameters(False)}
    for name, module in model.named_modules():
        if id(module) in left_out or is_inside(name, modules_to_save):
            continue
        if is_linear(module):
            left_out |= {id(part) for part in module.modules()}  # the base of a quantized one
            if id(module.weight) not in counted:
                counted |= {id(p) for p in module.parameters()}
                count = math.prod(matrix_shape(module))
                yield name, type(module).__name__, count, NOT_SELECTED
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted or key.endswith("bias"):
                continue
            if parameter.dim() in (2, 3) and 1 not in parameter.shape:
                counted.add(id(parameter))
                shape = "×".join(map(str, parameter.shape))
                kind = f"{type(module).__name__}.{key} [{shape}]"
                reason = THREE_DIMENSIONS if parameter.dim() == 3 else TWO_DIMENSIONS
                yield f"{name}.{key}".lstrip("."), kind, parameter.numel(), reason


__all__ = ["NOT_SELECTED", "Coverage", "CoverageWarning", "Skipped", "coverage_of"]
