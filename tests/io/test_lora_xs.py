"""LoRA-XS adapters: only R is stored; A and B are rebuilt from the weights, or loading fails."""

import pytest
import torch
from safetensors.torch import load_file

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build
from tests.rewriting import restate, rewrite

TARGETS = ("q_proj", "up_proj")


@pytest.fixture
def saved(tmp_path):
    config = LoRASBConfig(4, TARGETS, init="lora-xs", lora_alpha=8, core_std=0.3)
    model = adapt(build("llama"), config, progress=False)
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_the_cores_alone_are_enough(saved):
    model, directory = saved
    assert set(load_file(directory / "adapter.safetensors")) == {"cores"}
    stored = load_file(directory / "subspace.safetensors")
    assert all(name.endswith(("lora_A_probe", "lora_B_probe")) for name in stored)
    batch = batches("llama")[0]
    loaded = load_adapter(build("llama"), directory)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert (build("llama")(**batch).logits - model(**batch).logits).abs().max() > 1e-3
    twin = adapt(build("llama"), model.lorasb_config, progress=False)
    with torch.no_grad():
        for layer in adapted_layers(twin).values():
            layer.lora_R.zero_()
    load_adapter(twin, directory)
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)


def test_only_the_cores_change_on_saving_again(saved):
    model, directory = saved
    before = (directory / "lorasb_config.json").stat().st_mtime_ns
    save_adapter(model, directory)
    assert (directory / "lorasb_config.json").stat().st_mtime_ns == before


def test_a_low_precision_base_rebuilds_the_same(tmp_path):
    config = LoRASBConfig(4, TARGETS, init="lora-xs", core_std=0.3)
    model = adapt(build("llama").bfloat16(), config, progress=False)
    save_adapter(model, tmp_path)
    loaded = load_adapter(build("llama").bfloat16(), tmp_path)
    for name, layer in adapted_layers(loaded).items():
        assert torch.equal(layer.lora_B, adapted_layers(model)[name].lora_B)


def test_another_base_model_is_refused(saved):
    _, directory = saved
    base = build("llama", seed=5)
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match="rebuilt from the weight, is not the one"):
        load_adapter(base, directory)
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("side", ["lora_A_probe", "lora_B_probe"])
def test_one_turned_singular_vector_is_refused(saved, side):
    _, directory = saved
    for row in range(4):

        def turn(tensors, row=row):
            tensors[f"model.layers.0.mlp.up_proj.{side}"][row].neg_()

        rewrite(directory / "subspace.safetensors", turn)
        restate(directory)
        with pytest.raises(ValueError, match="rebuilt from the weight, is not the one"):
            load_adapter(build("llama"), directory)
        rewrite(directory / "subspace.safetensors", turn)
