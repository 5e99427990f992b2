"""Layers that a model passes by, or runs with gradients off, are found by running it once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.init.estimation.usage import GRADIENTS_OFF, WEIGHT_READ, unusable_layers
from lorasb_kernels.targets import CoverageWarning, adapted_layers, find_targets
from tests.families.tiny import build


class Attention(nn.Module):
    """Uses its layers in every way that there is."""

    LAYERS = ("called", "product", "transposed", "detached", "in_list", "trained", "off", "both")

    def __init__(self):
        super().__init__()
        for name in (*self.LAYERS, "as_type", "as_dtype", "as_shape", "unused"):
            setattr(self, name, nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)  # writes its statistics in training mode

    def forward(self, x):
        x = self.norm(x)
        x = self.called(x) + F.linear(x, self.product.weight)
        x = x + x @ self.transposed.weight.T + x @ self.detached.weight.detach()
        x = x + x @ torch.stack([self.in_list.weight, self.called.bias.expand(4, 4)])[0]
        x = x + x @ self.trained.weight if self.training else self.trained(x)
        with torch.no_grad():
            x = x + self.off(x) + self.both(x)
        x = x + self.both(x)
        x = self.as_type(x.type_as(self.as_type.weight)) + torch.zeros_like(self.as_type.weight)
        x = self.as_dtype(x.to(self.as_dtype.weight.dtype))
        return self.as_shape(x[..., : self.as_shape.weight.shape[1]])


EXPECTED = {
    **dict.fromkeys(("product", "transposed", "detached", "in_list", "trained"), WEIGHT_READ),
    "off": GRADIENTS_OFF,
}


def test_every_way_to_pass_by_a_layer():
    model = Attention().train()
    model.called.eval()
    modes = [module.training for module in model.modules()]
    layers = find_targets(model, "all-linear")
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = unusable_layers(model, layers, torch.ones(4, 4), lambda m, x: m(x))
    assert found == EXPECTED
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in vars(layer) for layer in layers.values())
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_that_fails_on_the_batch_is_left_to_training():
    model = Attention()
    layers = find_targets(model, "all-linear")
    assert unusable_layers(model, layers, torch.ones(4, 3), lambda m, x: m(x)) == {}
    assert unusable_layers(model, layers) == {}  # no transformers model: no tiny batch
    assert all("forward" not in vars(layer) for layer in layers.values())


def test_attention_that_reads_past_its_projections_is_left_out():
    model = build("WavLMForSequenceClassification")
    with pytest.warns(CoverageWarning, match="the model reads its weight past the layer"):
        adapt(model, LoRASBConfig(4, init="lora-xs"), progress=False)
    names = adapted_layers(model)
    assert names
    assert not any(".attention." in name and name.endswith("_proj") for name in names)
    assert sum(name.endswith("_dense") for name in names) == 4


@pytest.mark.parametrize("options", [{"strict": True}, {}])
def test_it_is_refused_where_it_is_named(options):
    model = build("WavLMForSequenceClassification")
    targets = "all-linear" if options else ("q_proj", "intermediate_dense")
    with pytest.raises(ValueError, match=r"attention\.\w+_proj would have an adapter without"):
        adapt(model, LoRASBConfig(4, targets, "orthogonal"), progress=False, **options)
    assert not adapted_layers(model)


def test_the_callers_batch_is_taken_if_there_is_one():
    model = Attention()
    config = LoRASBConfig(2, init="lora")
    from lorasb_kernels import EstimationOptions

    options = EstimationOptions(loss_fn=lambda m, x: m(x).sum())
    with pytest.warns(CoverageWarning, match="1 Linear .*, such as off: the model runs it with"):
        adapt(model, config, [torch.ones(4, 4)], estimation=options, progress=False)
    assert adapted_layers(model).keys() == set(dict(model.named_children())) - EXPECTED.keys() - {
        "norm"
    }
