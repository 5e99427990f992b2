"""One subspace, many adapters: each is one small file, found, checked and the same function."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lorasb_kernels import (
    LoRASBConfig,
    Subspace,
    adapt,
    load_adapter,
    merge_checkpoint,
    save_adapter,
)
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

TARGETS = ("q_proj", "down_proj")
FILE = "adapter.safetensors"


def start(init="orthogonal", **settings):
    config = LoRASBConfig(4, TARGETS, init=init, core_std=0.3, **settings)
    return adapt(build("llama"), config, progress=False)


def train(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(**batches("llama")[0]).logits


@pytest.fixture(params=["orthogonal", "lora-xs", "lora"])
def shared(request, tmp_path):
    """A model, its subspace, and what two adapters of it compute."""
    model = start(request.param)
    save_adapter(model, tmp_path / "subspace")
    expected = {}
    for seed in (1, 2):
        save_adapter(train(model, seed), tmp_path / str(seed), subspace=tmp_path / "subspace")
        expected[str(seed)] = logits(model)
    return tmp_path, expected


def test_an_adapter_is_one_file_and_finds_its_subspace(shared, tmp_path_factory):
    folder, expected = shared
    assert not torch.equal(expected["1"], expected["2"])
    for name, outputs in expected.items():
        assert [path.name for path in (folder / name).iterdir()] == [FILE]
        torch.testing.assert_close(logits(load_adapter(build("llama"), folder / name)), outputs)
    moved = tmp_path_factory.mktemp("moved") / "together"
    shutil.move(folder, moved)
    torch.testing.assert_close(logits(load_adapter(build("llama"), moved / "1")), expected["1"])


def test_a_subspace_is_read_once_for_many(shared):
    folder, expected = shared
    subspace = Subspace.load(folder / "subspace")
    model = load_adapter(build("llama"), folder / "subspace")
    shutil.move(folder / "subspace", folder / "elsewhere")  # nothing is read from there any more
    for name, outputs in expected.items():
        load_adapter(model, folder / name, subspace=subspace)
        torch.testing.assert_close(logits(model), outputs)
        trained = subspace.read(folder / name)
        for key, tensor in trained.items():
            assert torch.equal(tensor, model.get_parameter(key))
    with pytest.raises(FileNotFoundError, match=r"saved in '\.\./subspace'.*expected subspace="):
        load_adapter(build("llama"), folder / "1")
    again = load_adapter(build("llama"), folder / "1", subspace=folder / "elsewhere")
    torch.testing.assert_close(logits(again), expected["1"])


def test_an_adapter_of_a_subspace_is_merged(shared, tmp_path):
    folder, expected = shared
    build("llama").save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", folder / "1", tmp_path / "merged", progress=False)
    merged = type(build("llama")).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected["1"], rtol=1e-4, atol=1e-5)


def test_another_subspace_is_refused(shared):
    folder, _ = shared
    init = Subspace.load(folder / "subspace").record.config.init
    other = start(init, seed=1)
    with pytest.raises(ValueError, match="the model is adapted with"):
        save_adapter(other, folder / "3", subspace=folder / "subspace")
    save_adapter(other, folder / "other")
    with pytest.raises(ValueError, match="do not belong together"):
        load_adapter(build("llama"), folder / "1", subspace=folder / "other")
    with pytest.raises(ValueError, match="holds a subspace of its own"):
        save_adapter(start(init), folder / "other", subspace=folder / "subspace")
    with pytest.raises(FileNotFoundError, match=r"lorasb_config\.json is missing"):
        save_adapter(start(init), folder / "3", subspace=folder / "1")
    assert not (folder / "3").exists()


def test_other_factors_under_the_same_settings_are_refused(tmp_path):
    model = start()
    save_adapter(model, tmp_path / "subspace")
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).lora_A[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"lora_A of .* is not the one in"):
        save_adapter(model, tmp_path / "1", subspace=tmp_path / "subspace")
    adapted = load_adapter(build("llama"), tmp_path / "subspace")
    next(iter(adapted_layers(adapted).values())).weight.data.add_(1)
    with pytest.raises(ValueError, match="is not the one this adapter was made for"):
        save_adapter(adapted, tmp_path / "1", subspace=tmp_path / "subspace")


def test_a_file_on_disk_fetches_nothing(tmp_path, monkeypatch):
    """An adapter that names a hub repository: only whoever loads it can say so."""
    model = start()
    save_adapter(model, tmp_path / "subspace")
    subspace = Subspace.load(tmp_path / "subspace")
    hub = Subspace(subspace.folder, subspace.record, subspace.tensors, hub_id="someone/subspace")
    save_adapter(model, tmp_path / "1", subspace=hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="saved in 'someone/subspace'"):
        load_adapter(build("llama"), tmp_path / "1")
    loaded = load_adapter(build("llama"), tmp_path / "1", subspace=tmp_path / "subspace")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cores_are_rounded_once(tmp_path, dtype):
    model = train(start(), 1)
    save_adapter(model, tmp_path, dtype=dtype)
    loaded = load_adapter(build("llama"), tmp_path)
    for name, layer in adapted_layers(loaded).items():
        own = adapted_layers(model)[name].lora_R
        assert layer.lora_R.dtype == torch.float32
        assert torch.equal(layer.lora_R, own.to(dtype).float())


def test_dtypes_that_cannot_hold_a_core_are_refused(tmp_path):
    model = start()
    next(iter(adapted_layers(model).values())).lora_R.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"lora_R is not finite in torch\.float16"):
        save_adapter(model, tmp_path / "a", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; expected one of torch\.float32"):
        save_adapter(model, tmp_path / "a", dtype=torch.int8)
    assert not (tmp_path / "a").exists()


def test_a_million_users_of_gpt_3_take_100_gigabytes(tmp_path):
    """96 blocks with adapted q and v at r = 16, as in LoRA-XS's example; the cores are real."""
    model = nn.Module()
    model.h = nn.ModuleList()
    for _ in range(96):
        block = nn.Module()
        block.attn = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 16)})
        model.h.append(block)
    adapt(model, LoRASBConfig(16, init="lora-xs"), progress=False)
    save_adapter(model, tmp_path / "subspace")
    user = tmp_path / "users" / "1"
    save_adapter(model, user, dtype=torch.bfloat16, subspace=tmp_path / "subspace")
    size = sum(path.stat().st_size for path in Path(user).rglob("*"))
    assert size >= 192 * 16 * 16 * 2
    assert size * 1_000_000 <= 100e9
