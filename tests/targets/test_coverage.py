"""The share of the matrix weights that is adapted, and what is not."""

import pytest
import torch
from torch import nn

from lorasb_kernels import LoRASBConfig, describe
from tests.families.tiny import build
from tests.models import build as build_dense

CONFIG = LoRASBConfig(4, init="orthogonal")


def test_experts_are_named_with_their_share():
    model = build("MixtralForCausalLM")
    coverage = describe(model, CONFIG).coverage
    experts = [p for n, p in model.named_parameters() if "experts." in n]
    attention = [p for n, p in model.named_parameters() if "_proj.weight" in n]
    routers = [p for n, p in model.named_parameters() if n.endswith("gate.weight")]
    count = {name: sum(map(torch.numel, ps)) for name, ps in locals().items() if type(ps) is list}
    assert coverage.adapted == count["attention"]
    assert coverage.total == sum(count.values())
    left_out = {group.kind: group for group in coverage.skipped}
    assert sum(g.weights for k, g in left_out.items() if "Experts" in k) == count["experts"]
    group = left_out["MixtralExperts.gate_up_proj [4×128×32]"]
    assert group.names == tuple(f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1))
    assert group.reason == "a parameter of three dimensions, of no linear layer"
    line = f"not adapted: 2 {group.kind} ({group.weights / coverage.total:.1%}), such as "
    assert line + group.names[0] in str(coverage)


def test_embeddings_convolutions_biases_and_broadcast_parameters_do_not_count():
    model = build("ViTForImageClassification")
    coverage = describe(model, CONFIG).coverage
    assert coverage.share == 1
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    assert coverage.total == sum(layer.weight.numel() for layer in layers)


def test_what_is_not_among_the_targets_or_trained_whole():
    model = build_dense("roberta")
    named = LoRASBConfig(4, ("query",), "orthogonal", modules_to_save=("value",))
    coverage = describe(model, named).coverage
    query = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("query"))
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    total = sum(m.weight.numel() for n, m in linear if not n.endswith("value"))
    total -= sum(m.weight.numel() for n, m in linear if n.startswith("classifier"))
    assert (coverage.adapted, coverage.total) == (query, total)
    assert {group.reason for group in coverage.skipped} == {"not selected"}


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "WavLMForSequenceClassification"])
def test_on_the_meta_device_it_is_the_same(name):
    with torch.device("meta"):
        planned = describe(build(name), CONFIG).coverage
    assert planned == describe(build(name), CONFIG).coverage
