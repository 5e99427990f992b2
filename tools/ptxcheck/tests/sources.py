"""What the tests share: the sources of this folder, the faults planted in them, the checks."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = {"check_races": True, "check_uninit": True, "check_overlap": True}


def slow(*values):
    """A parameter that is tried outside of the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(names, *kept):
    """Parameters of which only those kept are tried in the default run: each is a compilation."""
    return [name if name in kept else slow(name) for name in names]


def faults(source: str) -> dict[str, int]:
    """The names in the source's first enum and their values, for -DFAULT."""
    names = re.search(r"enum \{(.*?)\}", (HERE / source).read_text(), re.DOTALL)[1]
    return {name: k for k, name in enumerate(re.findall(r"[A-Z]\w+", names), 1)}
