"""Settings that describe themselves: what each is, which values it takes, where it belongs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.utils.fields import shown


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have.

    Args:
        text: in words; `{name}` stands for the setting.
        holds: whether it holds a number. NaN is in no range.
    """

    text: str
    holds: Callable[[float], bool]


POSITIVE = Range("a positive number", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("0 ≤ {name} < inf", lambda x: 0 <= x < math.inf)
BELOW_1 = Range("0 ≤ {name} < 1", lambda x: 0 <= x < 1)
UP_TO_1 = Range("0 ≤ {name} ≤ 1", lambda x: 0 <= x <= 1)
SHARE = Range("0 < {name} ≤ 1", lambda x: 0 < x <= 1)
SEED = Range("0 ≤ {name} < 2³²", lambda x: 0 <= x < 2**32)


def setting(
    section: str,
    description: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] = (),
    range: Range | None = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        section: its heading in help and documentation.
        description: what it is, for help and documentation, without a full stop.
        default: without one it must be given.
        choices: the texts it may be.
        range: the numbers it may be.
    """
    about = {
        "section": section,
        "description": description,
        "choices": tuple(choices),
        "range": range,
    }
    return dataclasses.field(default=default, metadata=about)


def check_choices(settings: Any) -> None:
    """Refuses a value that is none of a setting's choices; None is not checked.

    Raises:
        ConfigError: names the setting, its value and the choices.
    """
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{field.name} is {shown(value)}; expected one of {', '.join(choices)}"
            )


def check_ranges(settings: Any) -> None:
    """Refuses a number outside a setting's range; None is not checked.

    Raises:
        ConfigError: names the setting, its value and the range.
    """
    for field in dataclasses.fields(settings):
        value, range = getattr(settings, field.name), field.metadata["range"]
        if range is not None and value is not None and not range.holds(value):
            expected = range.text.format(name=field.name)
            raise ConfigError(f"{field.name} is {shown(value)}; expected {expected}")


__all__ = [
    "BELOW_1",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SEED",
    "SHARE",
    "UP_TO_1",
    "Range",
    "check_choices",
    "check_ranges",
    "setting",
]
