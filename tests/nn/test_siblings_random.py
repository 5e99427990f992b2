"""Random programs run by a parent with shared inputs and by one without: the same results.

A program is a list of actions: calls of siblings, inside a call of their parent or not, and
changes between them. A write that no version shows (`.data`) comes between calls of the parent
alone: inside one it is what the parent must not do.
"""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_kernels.nn import LoRALinear, LoRASBLinear
from tests.nn.test_siblings import NAMES, inputs, parents

layers = st.sampled_from(NAMES)
calls = st.tuples(st.just("call"), layers, st.sampled_from(["x", "x", "x", "other"]))
backward = st.tuples(st.just("backward"), st.integers(0, 5))
CHANGES = (
    st.tuples(st.just("core"), layers),
    st.tuples(st.just("new core"), layers),
    st.tuples(st.just("core.data ="), layers),
    st.tuples(st.just("factors"), layers),
    st.tuples(st.just("weight"), layers),
    st.tuples(st.just("scaling"), layers, st.sampled_from([0.5, 2.0])),
    st.tuples(st.just("train"), layers, st.booleans()),
    st.tuples(st.just("merge"), layers),
    st.tuples(st.just("unmerge"), layers),
    st.tuples(st.just("x in place")),
    st.tuples(st.just("x.data =")),
    st.tuples(st.just("x requires grad"), st.booleans()),
    st.tuples(st.just("x detached")),
    st.tuples(st.just("grad"), st.booleans()),
    st.tuples(st.just("inference"), st.booleans()),
    st.tuples(st.just("autocast"), st.booleans()),
)
UNSEEN = (
    st.tuples(st.just("core.data"), layers),
    st.tuples(st.just("x.data")),
)


@st.composite
def programs(draw):
    """Calls of the parent, each of some siblings in some order, with something in between."""
    inside = st.one_of(*CHANGES, *CHANGES, calls, backward)
    between = st.lists(st.one_of(*CHANGES, *UNSEEN, *UNSEEN, calls, backward), max_size=3)
    program = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(NAMES))
        order = order[: draw(st.sampled_from([3, 3, 3, 2, 1]))]
        gaps = draw(st.tuples(*(st.lists(inside, max_size=1) for _ in order)))
        body = [
            step
            for name, gap in zip(order, gaps, strict=True)
            for step in (*gap, ("call", name, "x"))
        ]
        program += [("parent", body), *draw(between)]
    return program


class Machine:
    """Runs a program on one parent and notes what comes out."""

    def __init__(self, parent):
        self.parent = parent
        self.leaf = inputs().requires_grad_()
        self.x, self.other = self.leaf * 1, inputs() + 1
        self.outputs, self.noted = [], []
        self.modes = {"grad": None, "inference": None, "autocast": None}

    def run(self, program):
        with contextlib.ExitStack() as stack:
            for action, *arguments in program:
                self.step(stack, action, *arguments)
        return [
            *self.noted,
            *self.outputs,
            self.leaf.grad,
            self.x,
            *(p.grad for p in self.parent.parameters()),
        ]

    def step(self, stack, action, *arguments):
        try:
            self.act(stack, action, *arguments)
        except RuntimeError as error:
            # What autograd refuses: a graph walked twice, a saved tensor changed.
            self.noted.append(str(error)[:40])

    def act(self, stack, action, *arguments):
        layer = getattr(self.parent, arguments[0]) if arguments and arguments[0] in NAMES else None
        match action:
            case "parent":
                with contextlib.ExitStack() as inside:
                    body = lambda _: [self.step(inside, *step) for step in arguments[0]]  # noqa: E731
                    self.parent(body)
            case "call":
                self.outputs.append(layer(getattr(self, arguments[1])))
            case "backward":
                if self.outputs:
                    output = self.outputs[arguments[0] % len(self.outputs)]
                    if output.requires_grad:
                        output.sin().sum().backward()
            case "grad":
                stack.enter_context(torch.set_grad_enabled(arguments[0]))
            case "inference":
                stack.enter_context(torch.inference_mode(arguments[0]))
            case "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=arguments[0]))
            case "x requires grad":
                self.x.requires_grad_(arguments[0])
            case "x detached":
                self.x.detach_()
            case "x in place":
                self.x.add_(0.5)
            case "x.data":
                self.x.data.add_(0.5)
            case "x.data =":
                self.x.data = self.x.detach() + 0.5
            case "train":
                layer.train(arguments[1])
            case "scaling":
                layer.scaling = arguments[1]
            case "merge":
                layer.merge(keep_original=True)
            case "unmerge":
                layer.unmerge()
            case "weight":
                with torch.no_grad():
                    layer.weight.add_(0.1)
            case "factors":
                layer.reset_adapter(torch.Generator().manual_seed(3))
            case "core":
                with torch.no_grad():
                    self.trained(layer).add_(0.1)
            case "core.data":
                self.trained(layer).data.add_(0.1)
            case "core.data =":
                self.trained(layer).data = self.trained(layer).detach() + 0.1
            case "new core":
                name = layer.trained[0]
                setattr(layer, name, torch.nn.Parameter(self.trained(layer).detach() + 0.1))

    @staticmethod
    def trained(layer):
        return getattr(layer, layer.trained[0])


def agree(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.requires_grad == theirs.requires_grad
            rounding = 3e-2 if theirs.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
        else:
            assert ours == theirs


@pytest.mark.parametrize("kind", [LoRASBLinear, LoRALinear])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@settings(max_examples=60, deadline=None)
@given(program=programs())
def test_any_program(kind, dropout, program):
    outcomes = []
    for parent in copy.deepcopy(PARENTS[kind, dropout]):
        torch.manual_seed(0)
        outcomes.append(Machine(parent).run(program))
    agree(outcomes[1], outcomes[0])


PARENTS = {
    (kind, dropout): parents(kind=kind, dropout=dropout)
    for kind in (LoRASBLinear, LoRALinear)
    for dropout in (0.0, 0.4)
}
