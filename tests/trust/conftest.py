"""Two numbers of drawn cases: a few in `make test`, many in the slow tests.

Draws are the same at every run of the same tests, so a red test stays red; another selection
may draw others, as hypothesis also tries constants of the modules that are loaded.
`--hypothesis-seed=N` draws others, and hypothesis prints how to repeat a failure.
"""

import pytest
from hypothesis import HealthCheck, settings

from tests.ops.conftest import (
    backend,
    device,
    dtype,
    partial_sums_in_single_precision,
)
from tests.train.conftest import bert, llama, tokenizer

COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
LITTLE = settings(**COMMON, max_examples=200)
MUCH = settings(**COMMON, max_examples=10_000)

__all__ = [
    "LITTLE",
    "MUCH",
    "backend",
    "bert",
    "device",
    "dtype",
    "llama",
    "partial_sums_in_single_precision",
    "tokenizer",
]


def amounts(little: int, much: int):
    """Parametrizes `cases` with a few, and as a slow test with many."""
    return pytest.mark.parametrize(
        "cases",
        [pytest.param(little, id="few"), pytest.param(much, id="many", marks=pytest.mark.slow)],
    )
