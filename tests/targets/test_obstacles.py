"""What can be adapted is decided by what a layer computes; what cannot is skipped or refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from lorasb_kernels import LoRASBConfig, adapt, describe
from lorasb_kernels.targets import CoverageWarning, adapted_layers, computes_linear
from tests.models import build


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Noisy(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class InFp32(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), None)


class Renamed(nn.Linear):
    def forward(self, x):
        return (self.weight @ x.mT).mT + self.bias


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(8, 4), True),
        (FalconLinear(8, 4), True),
        (FalconLinear(8, 4, bias=False), True),
        (Renamed(8, 4), True),
        (Conv1D(4, 8), True),
        (Llama4Router(hf.Llama4TextConfig(hidden_size=8, num_local_experts=4)), False),
        (Scaled(8, 4), False),
        (Noisy(8, 4), False),
        (InFp32(8, 4, bias=False), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_judged_by_its_forward(layer, expected):
    state, random = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    with torch.device("meta"):  # as when a model is described without its weights
        assert computes_linear(layer) is expected
    assert computes_linear(layer.to("meta")) is expected
    assert torch.equal(torch.get_rng_state(), random)
    assert state.keys() == layer.state_dict().keys()


def tied():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    return model


def parametrized():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    return model


REASONS = {
    "attention": (
        lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)}),
        "1 NonDynamicallyQuantizableLinear (20.0%), such as a.out_proj: its weight is read past",
        TypeError,
    ),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8)),
        "2 Linear (44.4%), such as 0.linear1: its weight is read past the layer",
        TypeError,
    ),
    "small": (
        lambda: nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 8)),
        "2 Linear (33.3%), such as 0: it has fewer than r = 4 inputs or outputs",
        ValueError,
    ),
    "router": (
        lambda: nn.Sequential(nn.Linear(8, 8), Noisy(8, 8)),
        "1 Noisy (50.0%), such as 1: its forward is not that of nn.Linear",
        TypeError,
    ),
    "tied": (tied, "such as a: its weight is shared with another module", ValueError),
    "parametrized": (parametrized, "such as 0: its weight is parametrized", TypeError),
    "hooked": (hooked, "1 Linear (50.0%), such as 0: it has hooks", ValueError),
    "integer": (
        lambda: nn.Sequential(integer(), nn.Linear(8, 8)),
        "such as 0: its weight is a Tensor of torch.int8",
        TypeError,
    ),
}


def integer():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("case", REASONS)
def test_all_linear_leaves_out_what_cannot_be_adapted_and_says_so_once(case):
    make, message, error = REASONS[case]
    model, config = make(), LoRASBConfig(4, init="orthogonal")
    with pytest.raises(error):
        adapt(make(), config, progress=False, strict=True)
    planned = describe(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt(model, config, progress=False)
    told = [str(w.message) for w in caught if w.category is CoverageWarning]
    assert len(told) == 1
    assert message in told[0]
    assert told[0] in str(planned)
    assert describe(model) == planned
    assert len(adapted_layers(model)) == 1


@pytest.mark.parametrize("case", REASONS)
def test_a_layer_that_is_named_is_refused(case):
    make, message, error = REASONS[case]
    name = message.split("such as ")[1].split(":")[0]
    model = make()
    with pytest.raises(error, match=rf"{name}\b"):
        adapt(model, LoRASBConfig(4, (name,), "orthogonal"), progress=False)
    assert not adapted_layers(model)


def test_a_model_without_anything_left_out_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(build("llama"), LoRASBConfig(4, init="orthogonal"), progress=False)


def test_where_nothing_can_be_adapted_the_first_reason_is_raised():
    with pytest.raises(ValueError, match=r"r is 64; expected r <= 32 for model\.lay"):
        adapt(build("llama"), LoRASBConfig(64, init="orthogonal"), progress=False)
