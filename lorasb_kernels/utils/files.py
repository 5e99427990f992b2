"""Files are written completely or not at all: to a temporary file in the same folder, renamed."""

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch


def cache_folder() -> Path:
    """`$LORASB_CACHE`, else `lorasb` under `$XDG_CACHE_HOME`, else `~/.cache/lorasb`."""
    if "LORASB_CACHE" in os.environ:
        return Path(os.environ["LORASB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasb"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it becomes `path`.

    The content is on disk before the file is renamed, so a crash at any moment leaves either the
    old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # The system applies the umask to 0o666; reading it would mean setting it for all threads.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # safetensors creates its own file, readable by the owner only.
        os.chmod(temporary, permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` when the block ends without an error.

    If the process is killed inside the block, `path` is unchanged and what was written remains in
    a folder `.<name>.<random>` next to it. An existing `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not named by the process id: in a container the next process has the same id.
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    building = temporary / "new"
    building.mkdir()
    try:
        yield building
        if path.exists():
            path.rename(temporary / "old")
        building.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also wrong encodings and endless numbers
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors as safetensors, atomically; views and device tensors are copied.

    Equal tensors and metadata give equal bytes, in any process.

    Raises:
        OSError: the file cannot be written (a full disk); the message names it.
    """
    from safetensors.torch import save_file  # imports torch, which `lorasb --help` does not need

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a safetensors file by name.

    The library writes them in the order of a hash table, which differs from process to process.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        if not header["__metadata__"]:
            return
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise OSError(f"{path} cannot be written: its header of {length} bytes grew")
        file.seek(8)
        file.write(text.ljust(length))


__all__ = [
    "atomic_folder",
    "cache_folder",
    "read_json",
    "replacing",
    "write_json",
    "write_tensors",
    "write_text",
]
