"""Adapters as version 0.1.0 wrote them, kept in `format_1/`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasb_kernels import load_adapter, merge_checkpoint, save_adapter
from tests.trust.hostile_files import Layers

FOLDER = Path(__file__).parent / "format_1"
KINDS = ("orthogonal", "lora-xs", "lora")
OUTPUTS = load_file(FOLDER / "outputs.safetensors")


def base() -> Layers:
    model = Layers()
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_and_is_saved_in_the_new_format(tmp_path, kind):
    model = load_adapter(base(), FOLDER / kind)
    torch.testing.assert_close(model(OUTPUTS["x"]), OUTPUTS[kind])
    shutil.copytree(FOLDER / kind, tmp_path / kind)
    save_adapter(model, tmp_path / kind)
    assert json.loads((tmp_path / kind / "lorasb_config.json").read_text())["format"] == "2"
    again = load_adapter(base(), tmp_path / kind)
    assert torch.equal(again(OUTPUTS["x"]), model(OUTPUTS["x"]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged(tmp_path, kind):
    (tmp_path / "base").mkdir()
    shutil.copy(FOLDER / "base.safetensors", tmp_path / "base" / "model.safetensors")
    merge_checkpoint(tmp_path / "base", FOLDER / kind, tmp_path / "merged", progress=False)
    model = base()
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(model(OUTPUTS["x"]), OUTPUTS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_and_strangers_are_named(tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(FOLDER / kind, folder)
    other = {"lora": "orthogonal"}.get(kind, "lora")
    shutil.copy(FOLDER / other / "adapter.safetensors", folder)
    with pytest.raises(ValueError, match="do not belong together"):
        load_adapter(base(), folder)
    content = bytearray((FOLDER / kind / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter\.safetensors is damaged"):
        load_adapter(base(), folder)
    with pytest.raises(ValueError, match="is not the one this adapter was"):
        load_adapter(Layers(seed=5), FOLDER / kind)
    with pytest.raises(ValueError, match="is of format 1"):
        save_adapter(
            load_adapter(base(), FOLDER / kind), tmp_path / "tenant", subspace=FOLDER / kind
        )


def test_a_regular_expression_in_a_file_is_not_evaluated(tmp_path):
    """This one takes longer than the age of the universe on the names of a model."""
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / "orthogonal", folder)
    record = json.loads((folder / "lorasb_config.json").read_text())
    record["config"]["target_modules"] = "(a+)+$"
    (folder / "lorasb_config.json").write_text(json.dumps(record))
    model = torch.nn.Module()
    model.add_module("a" * 60 + "b", torch.nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"1 of the adapter's 1 layers are no linear layers"):
        load_adapter(model, folder)
    assert load_adapter(base(), folder).lorasb_config.target_modules == "(a+)+$"
