"""An adapter that the model passes by is found at the first step, and is not merged."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels import (
    LoRASBConfig,
    PackedCores,
    adapt,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lorasb_kernels.nn.reached import UnreachedLayerWarning
from lorasb_kernels.targets import adapted_layers

CONFIG = LoRASBConfig(2, init="lora-xs", core_std=1.0)


class PassesBy(nn.Module):
    """Reads the weight of `read`; calls `rare` only where it is told to."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.rare = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, rare=False):
        x = F.linear(self.called(x), self.read.weight)
        return self.rare(x) if rare else x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return adapt(PassesBy(), CONFIG, progress=False)


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, **options):
    model(torch.ones(2, 4), **options).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def reached(model):
    return {name: layer.reached for name, layer in adapted_layers(model).items()}


def test_the_first_step_names_what_it_did_not_reach(model):
    optimizer = torch.optim.SGD(parameters(model), lr=0.01)
    assert set(reached(model).values()) == {None}
    with pytest.warns(UnreachedLayerWarning, match="2 of 3 adapted layers .* such as read"):
        step(model, optimizer)
    assert reached(model) == {"called": True, "read": False, "rare": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, rare=True)
    assert reached(model) == {"called": True, "read": False, "rare": True}


def test_merging_refuses_it_before_anything_changes(model):
    with pytest.warns(UnreachedLayerWarning):
        step(model, torch.optim.SGD(parameters(model), lr=0.01), rare=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="never reached 1 of 3 adapted layers, such as read"):
        merge_and_unload(model)
    with pytest.raises(ValueError, match="never reached this layer"):
        model.read.merge()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    x = torch.randn(3, 4)
    expected = model(x, rare=True)
    merge_and_unload(model, skip_unreached=True)
    assert not adapted_layers(model)
    torch.testing.assert_close(model(x, rare=True), expected)


def test_a_saved_adapter_tells_of_it(model, tmp_path):
    save_adapter(model, tmp_path / "before")
    with pytest.warns(UnreachedLayerWarning):
        step(model, torch.optim.SGD(parameters(model), lr=0.01), rare=True)
    save_adapter(model, tmp_path / "after")
    torch.manual_seed(0)
    with pytest.warns(UnreachedLayerWarning, match=r'never reached the layers \["read"\]'):
        load_adapter(PassesBy(), tmp_path / "after")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(PassesBy(), tmp_path / "before")


def test_an_adapter_that_is_zero_merges():
    model = adapt(PassesBy(), LoRASBConfig(2, init="orthogonal"), progress=False)
    with pytest.warns(UnreachedLayerWarning):
        step(model, torch.optim.SGD(parameters(model), lr=0.01))
    merge_and_unload(model)


def test_what_was_never_trained_merges(model):
    merge_and_unload(model)


def test_steps_of_another_model_say_nothing(model):
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert set(reached(model).values()) == {None}


def test_a_model_of_which_a_layer_is_left_says_nothing(model):
    kept = model.called
    del model.called, model.read, model.rare
    other = nn.Linear(4, 4)
    other(torch.randn(2, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert kept.reached is None


def test_packed_cores_are_seen(model):
    packed = PackedCores(model)
    with pytest.warns(UnreachedLayerWarning, match="such as read"):
        step(model, torch.optim.SGD([packed.parameter], lr=0.01), rare=True)
    assert reached(model)["read"] is False


def test_the_watch_ends_with_the_model():
    from lorasb_kernels.nn import reached as module

    model = adapt(PassesBy(), CONFIG, progress=False)
    twin = copy.deepcopy(model)
    count = len(module._watches)
    del model
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert len(module._watches) < count
