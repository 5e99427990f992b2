"""Folders of files by path or by the name of a repository on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_folder(source: str | Path, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder `source`, downloaded first if it names a hub repository.

    An existing folder is used as it is; huggingface_hub is imported only to download.

    Args:
        source: a path, or a repository id such as `"user/name"`.
        patterns: names of the files needed, globs allowed.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        ImportError: a repository id without huggingface_hub installed.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if isinstance(source, Path) or not _REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"{source} is missing; expected a folder or a hub repository id")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no folder here; reading it from the hub needs "
            "`pip install huggingface_hub`"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                source, revision=revision, allow_patterns=list(patterns)
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the hub repository of that name could not be "
            f"fetched ({type(error).__name__}: {error})"
        ) from error


__all__ = ["local_folder"]
