"""Settings that come from files or users, checked against the annotations of their dataclass."""

import dataclasses
import reprlib
import typing
from types import NoneType, UnionType
from typing import Any


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print numbers of thousands of digits.
        return repr(value) if abs(value) < 10**40 else f"<{value.bit_length()} bits>"


_short = _Short()
_short.maxlevel = 2
shown = _short.repr  # shows a value in a message, shortened


def check_fields(settings: Any) -> None:
    """Checks the type of every field of a dataclass; an int is a float too, a bool is no number.

    Raises:
        TypeError: a value of another type than its field's.
        ValueError: an integer of more than 64 bits, or text that no file and no path can hold.
    """
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        union = isinstance(field.type, UnionType)
        members = typing.get_args(field.type) if union else (field.type,)
        kinds = tuple(typing.get_origin(member) or member for member in members)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
            raise TypeError(f"{name} is {shown(value)}; expected {expected}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} has more than 64 bits; expected a smaller number")
        texts = value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{name} is {shown(value)}; expected strings in it")
            if not _is_text(text):
                raise ValueError(f"{name} is {shown(value)}; expected text that can be written")


def _is_text(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs
        return False


__all__ = ["check_fields", "shown"]
