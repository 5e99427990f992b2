"""`LoRALinear` in every use of an adapted model."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from lorasb_kernels import (
    LoRASBConfig,
    PackedCores,
    adapt,
    describe,
    explain,
    export_peft,
    load_adapter,
    merge_and_unload,
    merge_checkpoint,
    save_adapter,
)
from lorasb_kernels.nn.linear import LoRALinear
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build, few_steps


def config(**changes):
    return LoRASBConfig(**{"r": 4, "init": "lora", "lora_alpha": 8.0, "seed": 3} | changes)


def trained(architecture="llama", **changes):
    """A model whose A and B have been moved off their initial values."""
    model = adapt(build(architecture), config(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 20)
    return model


def outputs(model, architecture="llama"):
    with torch.no_grad():
        return model(**batches(architecture)[0]).logits


def test_a_new_adapter_computes_the_frozen_model_and_trains_a_and_b():
    plain = build("llama")
    model = adapt(copy.deepcopy(plain), config())
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=0, atol=1e-6)
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}
    layer = next(iter(adapted_layers(model).values()))
    assert layer.lora_R is None
    bound = 1 / math.sqrt(layer.in_features)
    assert layer.lora_A.abs().max() <= bound
    torch.testing.assert_close(layer.lora_A.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0)
    again = next(iter(adapted_layers(adapt(build("llama"), config())).values()))
    assert torch.equal(layer.lora_A, again.lora_A)


@pytest.mark.parametrize(("use_rslora", "s"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scaling(use_rslora, s):
    layer = next(iter(adapted_layers(trained(use_rslora=use_rslora)).values()))
    assert layer.scaling == s
    expected = s * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(layer.get_delta_weight(), expected)
    with pytest.raises(ValueError, match="use_rslora is True; expected lora_alpha"):
        LoRASBConfig(4, init="lora", use_rslora=True)


def test_the_factors_stay_fp32_in_a_bf16_model():
    model = trained().bfloat16()
    layer = next(iter(adapted_layers(model).values()))
    assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    model(**batches("llama")[0]).loss.backward()
    assert layer.lora_B.grad.dtype == torch.float32
    assert (layer.lora_B.grad != layer.lora_B.grad.bfloat16().float()).any()


def test_shared_inputs_change_nothing():
    losses, gradients = [], []
    for share_inputs in (False, True):
        model = trained(share_inputs=share_inputs)
        if share_inputs:
            assert any(layer.shared_input for layer in adapted_layers(model).values())
        loss = model(**batches("llama")[0]).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(losses[0], losses[1])
    for own, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(own, shared, rtol=1e-4, atol=1e-7)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as file:
        assert {name.rpartition(".")[2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118
    loaded = load_adapter(build("llama"), tmp_path)
    assert isinstance(next(iter(adapted_layers(loaded).values())), LoRALinear)
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match="is not the one this adapter was made for"):
        load_adapter(build("llama", seed=1), tmp_path)


def test_another_configuration_in_the_same_folder_replaces_the_first(tmp_path):
    """The frozen weights are the same, and here the fingerprint covers nothing else."""
    save_adapter(trained(lora_alpha=8.0), tmp_path)
    model = trained(lora_alpha=1.0)
    save_adapter(model, tmp_path)
    assert torch.equal(outputs(load_adapter(build("llama"), tmp_path)), outputs(model))


def test_merged_it_computes_the_same(tmp_path):
    model = trained()
    expected = outputs(model)
    save_adapter(model, tmp_path / "adapter")
    build("llama").save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = merge_and_unload(model)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    from_disk = type(merged).from_pretrained(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, from_disk.state_dict()[name]), name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_reads_the_export(tmp_path, use_rslora):
    model = trained(use_rslora=use_rslora)
    export_peft(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-6)


def test_description():
    planned = describe(build("llama"), config())
    made = describe(trained())
    assert planned == made
    layer = made.layers[0]
    assert layer.trainable == layer.r * (layer.in_features + layer.out_features)
    assert layer.subspace == 0
    assert layer.adapter_bytes == 4 * layer.trainable


def test_explanation_names_the_gradients():
    layer = LoRALinear(64, 48, 8, dtype=torch.bfloat16)
    steps = [step.operation for step in explain(layer, arch="sm_86").steps]
    assert steps == ["shrink", "expand", "q", "dA", "dB", "dx"]


def test_what_needs_a_core_is_refused():
    with pytest.raises(ValueError, match="which trains A and B; expected adapters that train"):
        PackedCores(trained())
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimal_gradient'"):
        LoRALinear(8, 8, 2, optimal_gradient=True)
    with pytest.raises(ValueError, match=r"lora_R has shape \(2, 2\); expected None"):
        LoRALinear(8, 8, 2).set_adapter(torch.ones(2, 8), torch.eye(2), torch.ones(8, 2))


def test_it_trains():
    model = adapt(build("llama"), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = few_steps(model, optimizer, batches("llama", 1))
    assert losses[-1] < losses[0]
