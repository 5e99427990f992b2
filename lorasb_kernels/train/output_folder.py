"""The output folder of a run: who is writing into it, whose run it is, what it holds.

.lock                  while a process works in the folder: which one
config.json            the settings of the run
data.json              number and digest of its training rows
start.safetensors      see `changed_base`
checkpoint-<step>/     see `trainer`
epochs.json, best.*    see `selection`
adapter/, model/       what is trained; an adapter as it was before training until it has ended
init.json, init.png    what `lorasb init` found
result.json            outcome of the run

A run with results cannot be started with other settings. One without, which ran out of
memory in its first step for example, is replaced by a start with other settings.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lorasb_kernels.io.subspace import is_untrained
from lorasb_kernels.train.changed_base import START_FILE
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.utils.files import read_json, write_json

LOCK = ".lock"
ADAPTER_FOLDER = "adapter"
# What other settings would contradict, beside what is trained.
RESULTS = ("checkpoint-*", "epochs.json", "init.json")
STAGING = ".checkpoint"
REMAINS = (STAGING, ".adapter.*", ".model.*", ".*.json.*")
REMAINS += ("adapter/.*.json.*", "adapter/.*.safetensors.*")
# Settings that may change between two starts of a run: nothing that is trained depends on them,
# those of evaluation unless every epoch is evaluated.
CHANGEABLE = {"keep_checkpoints", "report_to", "max_cut_share"}
OF_EVALUATION = {"eval_data", "eval_batch_size", "max_new_tokens", "stop", "response_prefix"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder` for as long as the block, or this process, lives.

    The folder is made if it is missing, and removed again if it is left empty.

    Raises:
        ConfigError: another process holds the folder, or it cannot be made or written.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _acquire(folder)
    except OSError as error:
        raise ConfigError(
            f"output_dir is {str(folder)!r}: {error.strerror}; expected a folder to write into"
        ) from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds the run
                break


def _acquire(folder: Path) -> TextIO:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another process has just removed the folder that it had made
            continue
        try:
            # The kernel releases it when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(lock)
            lock.close()
            raise ConfigError(
                f"output_dir {str(folder)!r} is in use by {holder}; expected its end, or another "
                "output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                lock.close()
                raise
            warnings.warn(
                f"the file system of {folder} has no locks ({error.strerror}): a second run in it "
                "would not be noticed",
                stacklevel=4,
            )
        if _is_at(path, lock):  # and has not been removed by the one who held it before
            lock.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
            lock.flush()
            return lock
        lock.close()


def _read_holder(lock: TextIO) -> str:
    for _ in range(100):  # it writes its name right after it has got the lock
        lock.seek(0)
        if holder := lock.read().strip():
            return holder
        time.sleep(0.01)
    return "another process"


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def digest_of(rows: Sequence) -> str:
    """SHA-256 of the training rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def difference(folder: Path, config: TrainConfig, rows: Sequence) -> str | None:
    """How this run differs from the one in `folder`, in words; None if it does not, or none is.

    Args:
        folder: the output folder.
        config: the settings. Those of evaluation and logging may differ.
        rows: the training rows.

    Raises:
        ConfigError: the files that say whose run it is are damaged, or the run has results and
            is another one.
    """
    if not (folder / "config.json").exists():
        return None
    try:
        data, known = (read_json(folder / name) for name in ("data.json", "config.json"))
        for name, value in (("data.json", data), ("config.json", known)):
            if not isinstance(value, dict):
                raise ValueError(f"{folder / name} holds no JSON object")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error}; expected what the run in output_dir wrote") from error
    # Settings that an earlier version did not have were at what is now their default.
    own = config.to_dict()
    before = TrainConfig(**{name: known[name] for name in own if name in known})
    changeable = CHANGEABLE
    if config.evaluate_every is None:  # epochs are compared by one metric on the same rows
        changeable = changeable | OF_EVALUATION
        if before.regression == config.regression:
            changeable = changeable | {"evaluation"}
    stored = before.to_dict()
    different = [n for n in own if n not in changeable and stored[n] != own[n]]
    if different:
        name = different[0]
        found = (
            f"{name} is {own[name]!r}, but output_dir {str(folder)!r} holds a run with "
            f"{stored[name]!r}"
        )
        expected = "the same settings or another output_dir"
    elif data != _description(rows):
        found = (
            f"data is {len(rows)} rows that are not those of the run in output_dir {str(folder)!r}"
        )
        expected = "the same rows, or another output_dir"
    else:
        return None
    if is_trained(folder) or any(any(folder.glob(pattern)) for pattern in RESULTS):
        raise ConfigError(f"{found}; expected {expected}")
    return found


def is_trained(folder: Path) -> bool:
    """Whether `folder` holds what a run has trained to its end."""
    adapter = folder / ADAPTER_FOLDER
    if adapter.exists() and not is_untrained(adapter):
        return True
    return any((folder / name).exists() for name in ("model", "result.json"))


def claim(folder: Path, config: TrainConfig, rows: Sequence, replaces: bool = False) -> None:
    """Writes into `folder` whose run it is. Only after everything that can be checked has been.

    Args:
        folder: gets `config.json`, the settings, and `data.json`, a digest of the rows.
        config: the settings.
        rows: the training rows.
        replaces: whether another run without results is there, whose initial adapter goes.
    """
    if replaces:
        (folder / START_FILE).unlink(missing_ok=True)
        if (adapter := folder / ADAPTER_FOLDER).exists():
            removed = folder / f".{ADAPTER_FOLDER}.replaced"  # at once, also if killed here
            adapter.rename(removed)
            shutil.rmtree(removed)
    write_json(folder / "data.json", _description(rows))
    write_json(folder / "config.json", config.to_dict())


def _description(rows: Sequence) -> dict:
    return {"rows": len(rows), "sha256": digest_of(rows)}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def remove_remains(folder: Path) -> None:
    """Removes what a killed run was writing or deleting."""
    for pattern in REMAINS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
