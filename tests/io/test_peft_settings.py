"""Every setting of peft's LoraConfig is understood, at its neutral value, or refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

from lorasb_kernels import import_peft
from lorasb_kernels.io.peft_settings import KNOWN, read_settings
from tests.models import batches, build

TARGETS = ["q_proj", "down_proj"]
CHANGED = {
    "bias": "all",
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "ensure_weight_tying": True,
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.down_proj"],
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
    "a_setting_of_a_later_peft": 3,
}


def logits(model):
    with torch.no_grad():
        return model(**batches("llama")[0]).logits


def trained(init, **settings):
    """A peft model whose A and B have been moved from their start, and the start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init, **settings
    )
    model = peft.get_peft_model(build("llama"), config).eval()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, start


def test_every_setting_of_the_installed_peft_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= KNOWN


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone_are_taken(tmp_path, init):
    model, _ = trained(init)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == init
    imported = import_peft(build("llama"), tmp_path, plain_lora=True)
    torch.testing.assert_close(logits(imported), logits(model))
    assert (logits(build("llama")) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_changed_base_needs_pefts_conversion(tmp_path, init, use_rslora):
    model, start = trained(init, use_rslora=use_rslora)
    expected, moved = logits(model), model.state_dict()
    model.save_pretrained(tmp_path / "unconverted")
    base = build("llama")
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{init}'.*expected one converted"):
        import_peft(base, tmp_path / "unconverted", plain_lora=True)
    assert list(base.state_dict()) == keys
    moved = {name: tensor.clone() for name, tensor in moved.items()}
    model.load_state_dict(start)
    model.save_pretrained(tmp_path / "start")
    model.load_state_dict(moved)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    imported = import_peft(base, tmp_path / "converted", plain_lora=True)
    assert imported.lorasb_config.r == 8
    torch.testing.assert_close(logits(imported), expected, rtol=1e-4, atol=1e-5)
    assert (logits(build("llama")) - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    trained(True)[0].save_pretrained(folder)
    return folder


def with_settings(plain: Path, folder: Path, **settings) -> Path:
    shutil.copytree(plain, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("name", CHANGED)
def test_what_has_no_counterpart_is_refused_by_name(plain, tmp_path, name):
    folder = with_settings(plain, tmp_path / "x", **{name: CHANGED[name]})
    model = build("llama")
    with pytest.raises(ValueError, match=f"{name} is .*; expected .*no counterpart here"):
        import_peft(model, folder, plain_lora=True)
    for value in (None, False, {}, []):
        neutral = with_settings(plain, tmp_path / repr(value), **{name: value})
        read_settings(neutral / "adapter_config.json")


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "a_new_one", 1, None, ["pissa"]])
def test_other_initializations_are_refused_by_name(plain, tmp_path, init):
    folder = with_settings(plain, tmp_path / "x", init_lora_weights=init)
    with pytest.raises(ValueError, match="init_lora_weights is"):
        import_peft(build("llama"), folder, plain_lora=True)


def test_a_real_dora_adapter_is_refused(tmp_path):
    model, _ = trained(True, use_dora=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora is True; expected False"):
        import_peft(build("llama"), tmp_path, plain_lora=True)
