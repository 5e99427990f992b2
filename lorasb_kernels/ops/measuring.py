"""Whether an operation may time its routes at this moment, and choose by what it finds.

`LORASB_TUNE` says when it does: `once` (the default), at the first use of a class of shapes that no
file covers; `now`, at the first use in this process, whatever its file of earlier measurements
says, which it replaces; `off`, never, and that file is not read either.
"""

import os
import threading

import torch

MODES = ("off", "once", "now")


class _Here(threading.local):
    observed = False


_HERE = _Here()


class Observed:
    """Within it nothing is measured: a compiled graph or a dispatch mode runs the operator."""

    def __enter__(self):
        self.before, _HERE.observed = _HERE.observed, True

    def __exit__(self, *_):
        _HERE.observed = self.before


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
    if _HERE.observed or torch.compiler.is_compiling():
        return "first used by a compiled graph or under a dispatch mode"
    if torch.are_deterministic_algorithms_enabled():
        return "first used in deterministic mode"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "first used while a CUDA graph was captured"
    return None


__all__ = ["MODES", "Observed", "tuning_mode", "why_not_measured"]
