"""What a call on hostile files may do: read, write inside its folder, raise what it documents.

An audit hook sees every file opened for writing, every folder made, renamed or removed, every
process started and every piece of code compiled or executed, from Python or C. It cannot be
removed, so it is installed once and listens only inside `watched`.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
_RUNS = ("exec", "compile", "import", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_RUNS += ("pickle.find_class", "socket.connect", "ctypes.dlopen", "marshal.loads")

_seen: list[tuple[str, tuple]] | None = None


def _listen(event: str, arguments: tuple) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event in _CHANGES:
        _seen.append((event, _paths(event, arguments)))
    elif event in _RUNS:
        _seen.append((f"{event} {arguments[:2]}", [Path("/")]))


sys.addaudithook(_listen)


@contextlib.contextmanager
def watched(folder: Path | None = None):
    """Asserts that the block writes nothing outside `folder` (None: nothing) and runs no code.

    Call the watched code once before; otherwise its first imports count as code that runs.
    """
    global _seen
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
        allowed = None if folder is None else folder.resolve()
        for event, paths in seen:
            for path in paths:
                inside = allowed is not None and path.is_relative_to(allowed)
                assert inside, f"{event} outside of {allowed}: {path}"


def _paths(event: str, arguments: tuple) -> list[Path]:
    """The paths that an event changes; where they are relative to an open folder, with it."""
    count = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
    folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
    base = Path(f"/proc/self/fd/{folder}") if folder != -1 else Path()
    return [
        (base / os.fsdecode(path)).resolve()
        for path in arguments[:count]
        if isinstance(path, (str, bytes, os.PathLike))
    ]


@contextlib.contextmanager
def bounded_memory(megabytes: int):
    """Asserts that the peak memory of this process grows by no more in the block."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    yield
    assert peak() - before <= megabytes, f"{peak() - before:.0f} MB more; expected {megabytes}"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
