"""Whether an operation may time its routes at this moment, and choose by what it finds.

`LORASB_TUNE` says when it does: `once` (the default), at the first use of a class of shapes that no
file covers; `now`, at the first use in this process, whatever its file of earlier measurements
says, which it replaces; `off`, never, and that file is not read either.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

MODES = ("off", "once", "now")


class _Here(threading.local):
    from_python = False  # this package is calling an operator
    compiled = False  # an operator runs that this package did not call


_HERE = _Here()


@contextlib.contextmanager
def calling_operator() -> Iterator[None]:
    """Around a call of an operator by this package, outside of compiled graphs."""
    before, _HERE.from_python = _HERE.from_python, True
    try:
        yield
    finally:
        _HERE.from_python = before


@contextlib.contextmanager
def running_operator() -> Iterator[None]:
    """Around the implementation of an operator: if nobody called it here, a compiled graph did."""
    before = _HERE.from_python, _HERE.compiled
    _HERE.from_python, _HERE.compiled = False, not _HERE.from_python
    try:
        yield
    finally:
        _HERE.from_python, _HERE.compiled = before


def tuning_mode() -> str:
    """The value of `LORASB_TUNE`.

    Raises:
        ValueError: it is not one of `MODES`.
    """
    mode = os.environ.get("LORASB_TUNE", "once")
    if mode not in MODES:
        raise ValueError(f"LORASB_TUNE is {mode!r}; expected one of {MODES}")
    return mode


def why_not_measured() -> str | None:
    """Why nothing may be timed here and now; None if it may."""
    if tuning_mode() == "off":
        return "LORASB_TUNE is off"
    if _HERE.compiled or torch.compiler.is_compiling():
        return "first used by a compiled graph"
    if torch.are_deterministic_algorithms_enabled():
        return "first used in deterministic mode"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "first used while a CUDA graph was captured"
    return None


__all__ = [
    "MODES",
    "calling_operator",
    "running_operator",
    "tuning_mode",
    "why_not_measured",
]
