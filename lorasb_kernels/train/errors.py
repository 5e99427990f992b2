"""Errors in what a user gave; the command line shows their message without a stack trace."""


class InputError(ValueError):
    """Input that cannot be used; the message names it, what it was and what is expected."""


class ConfigError(InputError):
    """A setting that cannot be used."""


class DataError(InputError):
    """A file or row that cannot be used; the message names the file and the line."""


class AssetError(InputError):
    """A model or data set of a demonstration that cannot be had; the message says what to do."""
