"""Modules by the ends of their names."""

import re

from torch import nn


def matches_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether `name` is one of `suffixes` or ends with `.` and one of them."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def is_inside(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the module `name`, or one that contains it, matches one of `suffixes`."""
    ends = [match.start() for match in re.finditer(r"\.", name)] + [len(name)]
    return any(matches_suffix(name[:end], suffixes) for end in ends)


def find_saved_modules(model: nn.Module, suffixes: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` selects; each suffix must match.

    Raises:
        ValueError: a suffix that matches nothing.
    """
    saved = {name: m for name, m in model.named_modules() if matches_suffix(name, suffixes)}
    for suffix in suffixes:
        if not any(matches_suffix(name, (suffix,)) for name in saved):
            raise ValueError(f"modules_to_save: {suffix!r} matches no module of the model")
    return saved


__all__ = ["find_saved_modules", "is_inside", "matches_suffix"]
