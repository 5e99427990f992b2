"""Progress bars: tqdm's if it is installed and there is a terminal, else none."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class ProgressBar(Protocol):
    """What the code that reports progress needs; tqdm has it."""

    def update(self, n: int = 1) -> object: ...
    def set_postfix_str(self, s: str) -> object: ...
    def close(self) -> object: ...


class _Silent:
    def update(self, n: int = 1) -> None: ...
    def set_postfix_str(self, s: str) -> None: ...
    def close(self) -> None: ...


def progress_bar(total: int, description: str, unit: str, enabled: bool = True) -> ProgressBar:
    """A bar of `total` steps; a silent one if not `enabled`, without tqdm or without a terminal."""
    if not enabled:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Silent()
    # disable=None: shown on a terminal only.
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, disable=None)


def track(description: str, unit: str = "batch") -> Callable[[Sequence], Iterator]:
    """A function that iterates over a sequence and shows a progress bar."""

    def walk(items: Sequence) -> Iterator:
        bar = progress_bar(len(items), description, unit)
        try:
            for item in items:
                yield item
                bar.update()
        finally:
            bar.close()

    return walk


__all__ = ["ProgressBar", "progress_bar", "track"]
