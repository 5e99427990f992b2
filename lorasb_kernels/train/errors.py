"""Errors in user input; the command line shows their message without a stack trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class InputError(ValueError):
    """Input that cannot be used; the message names it, what it was and what is expected."""


class ConfigError(InputError):
    """A setting that cannot be used."""


@contextmanager
def setting_errors(prefix: str = "") -> Iterator[None]:
    """Turns what other code raises about a setting that cannot be used into a `ConfigError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise ConfigError(f"{prefix}{error}") from error


class DataError(InputError):
    """A file or row that cannot be used; the message names the file and the line."""


class CheckpointError(InputError):
    """A checkpoint that cannot be resumed from; the message says what to do."""


class DivergedError(ArithmeticError):
    """A loss or gradient that is not finite; the message names the step."""


class AssetError(InputError):
    """A model or data set of a demonstration is unavailable; the message says what to do."""
