"""Progress bars: tqdm's if it is installed, otherwise none."""

from typing import Protocol


class ProgressBar(Protocol):
    """What the code that reports progress relies on; tqdm has it."""

    def update(self, n: int = 1) -> object: ...
    def close(self) -> None: ...


class _Silent:
    def update(self, n: int = 1) -> None: ...
    def close(self) -> None: ...


def progress_bar(total: int, description: str, unit: str, enabled: bool = True) -> ProgressBar:
    """A bar of `total` steps; a silent one when not `enabled` or without tqdm."""
    if not enabled:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True)


__all__ = ["ProgressBar", "progress_bar"]
