"""When an operation may measure: where Python calls it, not where a compiled graph runs it."""

import pytest
import torch

from lorasb_kernels.ops import reference
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.measuring import why_not_measured


@pytest.fixture
def reasons(monkeypatch):
    """What the implementation of `expand` is told while it runs."""
    torch.use_deterministic_algorithms(False)  # the other tests' setting
    monkeypatch.delenv("LORASB_TUNE", raising=False)
    found, computed = [], reference.expand

    def recorded(*arguments):
        found.append(why_not_measured())
        return computed(*arguments)

    monkeypatch.setattr(reference, "expand", recorded)
    return found


def product(x, p, B, weight):
    return expand(x, weight, p, B, None, 0.0, None, "reference")


@pytest.fixture
def operands():
    return tuple(torch.randn(*size) for size in ((5, 8), (5, 2), (6, 2), (6, 8)))


def test_eager_steps_may_measure_also_under_autocast_and_dispatch_modes(reasons, operands):
    from torch.utils.flop_counter import FlopCounterMode

    product(*operands)
    with torch.autocast("cpu"):
        product(*operands)
    with FlopCounterMode(display=False), torch.no_grad():
        product(*operands)
    assert reasons == [None] * 3


def test_a_compiled_graph_may_not(reasons, operands):
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    compiled(*operands)
    assert set(reasons) == {"first used by a compiled graph"}
    reasons.clear()
    product(*operands)
    assert reasons == [None], "the next call of Python's own"


def test_a_failure_leaves_no_mark(reasons, operands, monkeypatch):
    def failing(*_):
        raise ZeroDivisionError

    recorded = reference.expand
    monkeypatch.setattr(reference, "expand", failing)
    with torch.autocast("cpu"), pytest.raises(ZeroDivisionError):
        product(*operands)
    monkeypatch.setattr(reference, "expand", recorded)
    product(*operands)
    assert reasons == [None]
