"""transformers' Conv1D as the frozen layer: its weight is stored transposed and never copied."""

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lorasb_kernels import AdaptedLinear, LoRALinear, LoRASBLinear

M, N, R = 12, 8, 4


@pytest.fixture
def conv():
    torch.manual_seed(0)
    layer = Conv1D(M, N).double()
    layer.bias.data.normal_()
    return layer


def adapted(conv, kind=LoRASBLinear, seed=1):
    layer = kind.from_linear(conv, R, scaling=0.5)
    generator = torch.Generator().manual_seed(seed)
    for factor in layer.factors().values():
        factor.data.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def formula(conv, layer, x):
    core = torch.eye(R).double() if layer.lora_R is None else layer.lora_R
    return x @ conv.weight + conv.bias + 0.5 * x @ layer.lora_A.T @ core.T @ layer.lora_B.T


@pytest.mark.parametrize("kind", [LoRASBLinear, LoRALinear])
def test_it_computes_the_formula_and_its_gradients(conv, kind):
    layer, x = adapted(conv, kind), torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    trained = [getattr(layer, name) for name in layer.trained]
    y, expected = layer(x), formula(conv, layer, x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for own, theirs in zip(
        torch.autograd.grad(y, [x, *trained], dy),
        torch.autograd.grad(expected, [x, *trained], dy),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


def test_its_weight_is_that_of_the_layer(conv):
    layer = adapted(conv)
    assert layer.weight.data_ptr() == conv.weight.data_ptr()
    assert layer.weight.shape == conv.weight.shape
    assert layer.state_dict()["weight"].is_contiguous()
    assert (layer.in_features, layer.out_features) == (N, M)


def test_it_merges_into_that_weight_and_back(conv):
    layer, x, before = adapted(conv), torch.randn(5, N).double(), conv.weight.detach().clone()
    expected = layer(x).detach()
    layer.merge(keep_original=True)
    torch.testing.assert_close(layer(x), expected)
    plain = layer.to_linear()
    assert type(plain) is Conv1D
    assert plain.weight.data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(plain(x), expected)
    layer.unmerge()
    assert torch.equal(conv.weight, before)
    layer.merge()
    layer.unmerge()
    torch.testing.assert_close(conv.weight, before)


def test_a_copy_and_a_restored_state_compute_the_same(conv):
    layer, x = adapted(conv), torch.randn(5, N).double()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    other = adapted(Conv1D(M, N).double(), seed=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert isinstance(other, AdaptedLinear)
