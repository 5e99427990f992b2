"""Merging on disk: the same weights as merging in memory, and only complete folders."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from lorasb_kernels import (
    LoRASBConfig,
    adapt,
    load_adapter,
    merge_and_unload,
    merge_checkpoint,
    save_adapter,
)
from lorasb_kernels.cli.main import main
from tests.models import batches, build


def case(
    folder, init="orthogonal", dtype=torch.bfloat16, shard="20KB", architecture="llama", **fields
):
    """A base model in shards and an adapter for it; returns the model merged in memory."""
    build(architecture).to(dtype).save_pretrained(folder / "base", max_shard_size=shard)
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    fields = {"r": 4, "init": init, "scaling": 0.5, "core_std": 0.3, **fields}
    model = adapt(base, LoRASBConfig(**fields), progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    save_adapter(model, folder / "adapter")
    return merge_and_unload(model)


@pytest.mark.parametrize(
    ("init", "dtype", "shard"),
    [
        ("orthogonal", torch.bfloat16, "20KB"),
        ("lora-xs", torch.float32, "20KB"),
        ("orthogonal", torch.float32, "1GB"),
    ],
)
def test_every_weight_is_that_of_merging_in_memory(tmp_path, init, dtype, shard):
    expected = case(tmp_path, init, dtype, shard)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "base").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1 or shard == "1GB"
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    changed = 0
    for name, tensor in (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict().items()
    ):
        own = merged.state_dict()[name]
        assert own.dtype == dtype
        torch.testing.assert_close(own, expected.state_dict()[name])
        if init == "orthogonal":
            assert torch.equal(own, expected.state_dict()[name])
        changed += not torch.equal(own, tensor)
    assert changed == 14


@pytest.mark.parametrize("init", ["orthogonal", "lora-xs", "lora"])
def test_weights_that_are_stored_transposed(tmp_path, init):
    expected = case(tmp_path, init, torch.float32, architecture="gpt2")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, msg=name)
    square = "transformer.h.0.attn.c_proj.weight"
    base = build("gpt2").state_dict()[square]
    assert (merged.state_dict()[square] - base).abs().max() > 1e-3


def test_trained_modules_replace_those_of_the_base(tmp_path):
    expected = case(tmp_path, modules_to_save=("norm",))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert not torch.equal(expected.model.norm.weight, build("llama").bfloat16().model.norm.weight)
    assert torch.equal(merged.model.norm.weight, expected.model.norm.weight)


def test_a_bare_models_checkpoint_has_other_prefixes(tmp_path):
    base = build("roberta")
    base.roberta.save_pretrained(tmp_path / "base")
    model = adapt(base, LoRASBConfig(4, ("query",), init="lora-xs", core_std=0.3), progress=False)
    save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    merged = hf.RobertaModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    expected = merge_and_unload(model).roberta.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_command_line_merges(tmp_path, capsys):
    expected = case(tmp_path)
    flags = {"--model": "base", "--adapter": "adapter", "--out": "out"}
    arguments = ["merge"]
    for flag, name in flags.items():
        arguments += [flag, str(tmp_path / name)]
    assert main(arguments) == 0
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    batch = batches("llama")[0]
    assert torch.equal(merged(**batch).logits, expected(**batch).logits)
    assert main(arguments) == 2
    assert "which exists; expected a new folder" in capsys.readouterr().err


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def another_base(folder):
    shutil.rmtree(folder / "base")
    build("llama", seed=5).save_pretrained(folder / "base")


def no_safetensors(folder):
    (folder / "base" / "model.safetensors").unlink()


def overflowing(folder):
    path = folder / "base" / "model.safetensors"
    edit(path, lambda t: t["model.layers.0.mlp.up_proj.weight"][1, 1:].fill_(float("inf")))


def nameless(folder):
    path = folder / "base" / "model.safetensors"
    edit(path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (another_base, ValueError, "is not the one this adapter was made for"),
        (no_safetensors, FileNotFoundError, r"pickled \.bin files are not read"),
        (nameless, ValueError, r"holds no tensor for model\.layers\.1\.mlp\.up_proj\.weight"),
        (overflowing, ValueError, r"model\.layers\.0\.mlp\.up_proj\.weight would not be finite"),
    ],
)
def test_trouble_leaves_no_output(tmp_path, damage, error, message):
    case(tmp_path, dtype=torch.float32, shard="1GB")
    damage(tmp_path)
    with pytest.raises(error, match=message):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter"}


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    case(tmp_path, shard="1GB")
    record = json.loads((tmp_path / "adapter" / "lorasb_config.json").read_text())
    (tmp_path / "adapter" / "lorasb_config.json").write_text(
        json.dumps({**record, "subspace": "0" * 64})
    )
    with pytest.raises(ValueError, match="is not as it was saved: its fingerprint is another"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="is not as it was saved: its fingerprint is another"):
        load_adapter(build("llama"), tmp_path / "adapter")
