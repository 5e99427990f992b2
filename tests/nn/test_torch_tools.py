"""Adapted layers where `nn.Linear` works: meta and jagged tensors, flop counts, torch.fx."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lorasb_kernels import LoRALinear, LoRASBLinear
from lorasb_kernels.functional import lorasb_group
from tests.nn.test_state import KINDS, layer

M, n, m, r = 96, 24, 16, 4
FORWARD = 2 * M * r * (n + r) + 2 * M * m * (n + r)
INPUT_GRADIENT = 2 * M * n * (m + r)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_meta_tensors(kind, dropout):
    adapted = kind(n, m, r, dropout=dropout, device="meta")
    x = torch.randn(2, 3, n, device="meta", requires_grad=True)
    y = adapted(x)
    assert (y.shape, y.device.type) == ((2, 3, m), "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert adapted.get_delta_weight().shape == (m, n)
    moved = layer(kind).to("meta")
    assert moved(torch.empty(5, n, device="meta")).shape == (5, m)


@pytest.mark.parametrize("kind", KINDS)
def test_jagged_tensors(kind):
    adapted = layer(kind)
    parts = [torch.randn(length, n) for length in (3, 1, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = adapted(x)
    # A sum of the two is possible only where they know that their lengths are the same.
    (y + nn.Linear(n, m)(x)).values().sum().backward()
    for own, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(own, adapted(part))
    gradients = {name: getattr(adapted, name).grad.clone() for name in adapted.trained}
    adapted.zero_grad()
    adapted(torch.cat(parts)).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(getattr(adapted, name).grad, gradient)


def test_jagged_tensors_of_four_dimensions_and_those_that_are_refused():
    adapted = layer()
    parts = [torch.randn(length, 2, n) for length in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for own, part in zip(adapted(x).unbind(), parts, strict=True):
        torch.testing.assert_close(own, adapted(part.transpose(0, 1)))
    ragged_last = torch.nested.nested_tensor([torch.randn(3, n)] * 2, layout=torch.jagged)
    with pytest.raises(ValueError, match="ragged in another dimension than the last"):
        adapted(ragged_last.transpose(1, 2))
    with pytest.raises(ValueError, match=r"layout torch\.strided; expected layout torch\.jagged"):
        adapted(torch.nested.nested_tensor([torch.randn(3, n)]))


def counted(function) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class TestFlops:
    def test_a_layer_that_trains_its_core(self):
        adapted = layer(LoRASBLinear)
        x = torch.randn(M, n, requires_grad=True)
        core_backward = 2 * M * r * (m + 2 * r)
        expected = FORWARD + core_backward + INPUT_GRADIENT
        assert counted(lambda: adapted(x).sum().backward()) == expected
        # What plain PyTorch counts for the same products.
        x = x.detach().requires_grad_()
        plain = nn.functional.linear

        def eager():
            h = plain(x, adapted.lora_A)
            y = plain(x, adapted.weight) + plain(plain(h, adapted.lora_R), adapted.lora_B)
            y.sum().backward()

        assert counted(eager) == expected

    def test_a_layer_that_trains_a_and_b(self):
        adapted = layer(LoRALinear)
        x = torch.randn(M, n, requires_grad=True)
        q = 2 * M * r * (m + r)
        factors = 2 * M * r * (n + m)
        expected = FORWARD + q + factors + INPUT_GRADIENT
        assert counted(lambda: adapted(x).sum().backward()) == expected

    def test_layers_on_one_input(self):
        layers = [layer(seed=seed) for seed in (0, 1)]
        x = torch.randn(M, n, requires_grad=True)

        def group():
            operands = ([getattr(a, name) for a in layers] for name in ("weight", "lora_A"))
            cores_and_bs = ([getattr(a, name) for a in layers] for name in ("lora_R", "lora_B"))
            ys = lorasb_group(x, *operands, *cores_and_bs, [None, None], 0.5)
            sum(y.sum() for y in ys).backward()

        core_backward = 2 * M * r * (m + 2 * r)
        assert counted(group) == 2 * (FORWARD + core_backward + INPUT_GRADIENT)

    def test_the_operators_of_the_initialization(self):
        from lorasb_kernels.functional import (
            pack_signs,
            sign_accumulate_,
            sign_gradient,
            sign_matmul,
        )

        dy, x, acc = torch.randn(M, m), torch.randn(M, n), torch.zeros(m, n)
        assert counted(lambda: sign_accumulate_(acc, dy, x)) == 2 * M * m * n
        assert counted(lambda: sign_gradient(dy, x)) == 2 * M * m * n
        assert counted(lambda: pack_signs(acc)) == 0
        planes = pack_signs(acc)
        assert counted(lambda: sign_matmul(*planes, torch.randn(n, 3), n)) == 2 * m * n * 3
        product = counted(lambda: sign_matmul(*planes, torch.randn(m, 3), n, transpose=True))
        assert product == 2 * m * n * 3

    @pytest.mark.parametrize("first", ["lorasb_kernels.nn", "torch.utils.flop_counter"])
    def test_in_either_order_of_import(self, first):
        code = f"""
import importlib, sys, torch
importlib.import_module({first!r})
from lorasb_kernels.nn import LoRASBLinear
layer = LoRASBLinear({n}, {m}, {r}, bias=False)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.no_grad():
    layer(torch.randn({M}, {n})).addmm_(torch.ones({M}, 1), torch.ones(1, {m}))
print(counter.get_total_flops())
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
        )
        assert int(done.stdout) == FORWARD + 2 * M * m


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_trace(kind):
    adapted = layer(kind)
    traced = torch.fx.symbolic_trace(nn.Sequential(adapted, nn.ReLU()))
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [call.target.__name__ for call in calls] == ["lorasb_linear"]
    x = torch.randn(5, n)
    expected = adapted(x).relu()
    assert torch.equal(traced(x), expected)
    expected.sum().backward()
    gradients = {name: getattr(adapted, name).grad.clone() for name in adapted.trained}
    adapted.zero_grad()
    traced(x).sum().backward()
    for name, gradient in gradients.items():
        assert torch.equal(getattr(adapted, name).grad, gradient)


def test_symbolic_trace_keeps_the_optimal_gradient():
    adapted = layer(optimal_gradient=True)
    adapted._factors_changed()
    x = torch.randn(5, n)
    adapted(x).sum().backward()
    expected = adapted.lora_R.grad.clone()
    adapted.zero_grad()
    torch.fx.symbolic_trace(adapted)(x).sum().backward()
    assert torch.equal(adapted.lora_R.grad, expected)
