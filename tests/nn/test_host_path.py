"""What a layer asks of the host, counted: operators, Python frames, checks; and what it keeps.

Times are in `bench/host.py`. A layer calls its backend directly where nothing observes operators,
so every observer is tested too: it must see what it saw through torch's dispatcher.
"""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lorasb_kernels.nn import LoRALinear, LoRASBLinear
from lorasb_kernels.ops.lorasb_linear import api

KINDS = (LoRASBLinear, LoRALinear)
M, n, m, r = 5, 24, 16, 4


def adapted(kind=LoRASBLinear, **options):
    torch.manual_seed(0)
    layer = kind(n, m, r, **options)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.normal_(std=0.3)
    return layer


def tokens(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, n, generator=generator).to(dtype).requires_grad_()


def step(layer, x, dy):
    y = layer(x)
    y.backward(dy)


def operators(function) -> Counter:
    """The operators that `function` calls, without those that they call themselves."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    inner = ("aten::",)
    return Counter(
        event.name
        for event in events
        if event.cpu_parent is None or not event.cpu_parent.name.startswith(inner)
    )


def frames(function) -> int:
    """The Python frames that `function` enters."""
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(counting)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1  # that of `function`


@pytest.mark.parametrize("shape", [(M,), (2, 3)], ids=["rows", "batch"])
def test_operators_of_a_layer(shape):
    """Four products forward, five in backward, sums inside them; in each a view of one matrix."""
    layer, x = adapted(), tokens(*shape)
    dy = torch.ones(*shape, m)
    batched = len(shape) > 1
    for _ in range(2):
        step(layer, x, dy)
    expected = {"aten::linear": 3, "aten::t": 1, "aten::addmm_": 1}
    with torch.no_grad():
        found = operators(lambda: layer(x))
    assert found == expected | ({"aten::reshape": 1, "aten::_unsafe_view": 1} if batched else {})
    y = layer(x)
    x.grad = layer.lora_R.grad = None
    found = operators(lambda: y.backward(dy))
    products = {name: found[f"aten::{name}"] for name in ("mm", "addmm_", "t")}
    assert products == {"mm": 4, "addmm_": 1, "t": 1}
    others = {"aten::mm", "aten::addmm_", "aten::t", "aten::detach"}
    assert set(found) - others == ({"aten::reshape", "aten::view"} if batched else set())


@pytest.mark.parametrize(
    ("kind", "call", "backward"), [(LoRASBLinear, 15, 9), (LoRALinear, 16, 14)]
)
def test_frames_of_a_layer(kind, call, backward):
    """In a call, 2 more for an autograd node; in backward beside what autograd enters itself."""
    layer, x = adapted(kind), tokens(M)
    dy = torch.ones(M, m)
    step(layer, x, dy)
    with torch.no_grad():
        assert frames(lambda: layer(x)) <= call
    assert frames(lambda: layer(x)) <= call + 2
    y = layer(x)
    through_autograd = frames(lambda: y.backward(dy))
    plain = nn.functional.linear(x, layer.weight)
    assert through_autograd - frames(lambda: plain.backward(dy)) <= backward


class TestChecks:
    @pytest.fixture
    def checks(self, monkeypatch):
        """The shapes of x of every call that was checked."""
        checked, check_layer = [], api.check_layer

        def counting(x, *operands):
            checked.append(tuple(x.shape))
            return check_layer(x, *operands)

        monkeypatch.setattr(api, "check_layer", counting)
        return checked

    def test_a_layer_is_checked_in_its_first_call(self, checks):
        layer = adapted(scaling=0.501)  # arguments that no other test has
        for rows in (M, 2, 1):
            layer(tokens(rows))
            layer(tokens(2, rows))
        assert checks == [(M, n)]

    def test_and_again_when_something_changes(self, checks):
        layer = adapted(scaling=0.502)
        layer(tokens(M))
        layer.scaling = 0.503
        layer(tokens(M))
        layer.double()(tokens(M, dtype=torch.float64))
        assert len(checks) == 3

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda a: setattr(a.weight, "data", a.weight.data.double()), TypeError, "weight has"),
            (
                lambda a: setattr(a.lora_R, "data", torch.ones(3, 3)),
                ValueError,
                r"lora_A .*\(3",
            ),
            (lambda a: setattr(a.lora_A, "data", torch.ones(r, 7)), ValueError, r"lora_A .*\(4, 7"),
            (lambda a: setattr(a.bias, "data", torch.ones(3)), ValueError, r"bias .*\(3,\)"),
            (lambda a: a.weight.requires_grad_(), ValueError, "weight requires grad"),
            (lambda a: a.bias.requires_grad_(), ValueError, "bias requires grad"),
            (lambda a: setattr(a, "scaling", float("nan")), ValueError, "scaling is nan"),
            (lambda a: setattr(a, "scaling", [1.0]), TypeError, "scaling is a list"),
            (lambda a: setattr(a, "backend", "fast"), ValueError, "backend is 'fast'"),
        ],
    )
    def test_a_change_in_place_is_seen(self, change, error, message):
        layer = adapted()
        layer(tokens(M))
        change(layer)
        with pytest.raises(error, match=message):
            layer(tokens(M))

    def test_an_input_that_does_not_fit_is_named_after_one_that_does(self):
        layer = adapted()
        layer(tokens(M))
        for x, error in ((torch.ones(M, n + 1), ValueError), (torch.ones(M, n).int(), TypeError)):
            with pytest.raises(error, match="x has"):
                layer(x)
        with pytest.raises(ValueError, match=r"x has shape \(\)"):
            layer(torch.tensor(1.0))
        with pytest.raises(TypeError, match="x is a list"):
            layer([1.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_output_can_be_written_in_place(kind, grad):
    """As in `hidden += residual`."""
    layer, x = adapted(kind), tokens(2, 3)
    with torch.set_grad_enabled(grad):
        y = layer(x)
        before = y.detach().clone()
        y += 1
    torch.testing.assert_close(y, before + 1)
    if grad:
        y.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(M,), (2, 3), (2, 1, 3)])
def test_direct_calls_equal_the_formula(kind, scaling, shape):
    layer, x = adapted(kind, scaling=scaling).double(), tokens(*shape, dtype=torch.float64)
    core = layer.lora_R if layer.lora_R is not None else torch.eye(r, dtype=torch.float64)
    factors = [f.detach().clone().requires_grad_() for f in (layer.lora_A, core, layer.lora_B)]
    low = x.detach().clone().requires_grad_()
    exact = low @ layer.weight.T + layer.bias
    exact = exact + scaling * low @ factors[0].T @ factors[1].T @ factors[2].T
    dy = torch.randn(*shape, m, dtype=torch.float64)
    exact.backward(dy)
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(x.grad, low.grad)
    named = dict(zip(("lora_A", "lora_R", "lora_B"), factors, strict=True))
    for name in layer.trained:
        torch.testing.assert_close(getattr(layer, name).grad, named[name].grad)


class TestObservers:
    """What observes operators sees those of the layer, in forward alone and in backward alone."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_flops_of_one_pass(self, kind):
        layer, x = adapted(kind, bias=False), tokens(M)
        layer(x)
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        assert forward.get_total_flops() == 2 * M * r * (n + r) + 2 * M * m * (n + r)
        y = layer(x)  # not observed
        with FlopCounterMode(display=False) as backward:
            y.backward(torch.ones(M, m))
        core = 2 * M * r * (m + 2 * r)
        if kind is LoRALinear:
            core = 2 * M * r * (m + r) + 2 * M * r * (n + m)
        assert backward.get_total_flops() == core + 2 * M * n * (m + r)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_dispatch_mode(self, kind):
        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.append(function._schema.name)
                return function(*args, **(kwargs or {}))

        names, layer = [], adapted(kind)
        layer(tokens(M))
        with Names():
            step(layer, tokens(M), torch.ones(M, m))
        assert {"lorasb::shrink_reference", "lorasb::expand_reference"} <= set(names)

    def test_a_tensor_of_another_class(self):
        layer, x = adapted(), tokens(M).detach()
        expected = layer(x)
        y = layer(TwoTensor(x, 2 * x))
        assert torch.equal(y.a, expected)
        torch.testing.assert_close(y.b, layer(2 * x))

    def test_transforms_and_forward_mode_are_refused_and_not_ignored(self):
        layer, x = adapted(), tokens(M).detach()
        layer(x)
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.vmap(layer)(x[:, None])
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.jvp(layer, (x,), (x,))
        for grad in (True, False):
            refused = pytest.raises(RuntimeError, match="jvp")
            with torch.set_grad_enabled(grad), forward_ad.dual_level(), refused:
                layer(forward_ad.make_dual(x, x))

    @pytest.mark.parametrize("kind", KINDS)
    def test_autocast_around_one_pass(self, kind):
        layer, x = adapted(kind), tokens(M)
        expected = layer(x)
        expected.backward(torch.ones(M, m))
        gradient, x.grad = x.grad, None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(torch.ones(M, m))
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, gradient)  # computed in fp32 all the same

    def test_saved_tensors_pass_through_hooks(self):
        layer, x, packed = adapted(), tokens(M), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            y = layer(x)
        y.backward(torch.ones(M, m))
        shapes = Counter(tuple(t.shape) for t in packed)
        assert shapes == {(M, r): 1, (r, n): 1, (r, r): 1, (m, r): 1, (m, n): 1}


class TestWhereTheTensorsAre:
    def test_a_parametrized_core(self):
        class Doubled(nn.Module):
            def forward(self, core):
                return 2 * core

        layer, x = adapted(), tokens(M)
        with torch.no_grad():
            expected = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
        parametrize.register_parametrization(layer, "lora_R", Doubled())
        delta = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(delta, 2 * expected)
        delta.sum().backward()
        assert layer.parametrizations.lora_R.original.grad is not None

    def test_a_weight_that_became_an_attribute(self):
        """As FSDP with a flat parameter makes it."""
        layer, x = adapted(), tokens(M)
        expected = layer(x)
        weight = layer._parameters.pop("weight")
        layer.__dict__["weight"] = weight.detach()[:]
        assert torch.equal(layer(x), expected)

    def test_functional_call(self):
        layer, x = adapted(), tokens(M)
        core = torch.zeros(r, r)
        y = torch.func.functional_call(layer, {"lora_R": core}, (x,))
        torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
