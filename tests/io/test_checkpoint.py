"""Saving and loading adapters: bit for bit in a new process; damaged files are refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from lorasb_kernels.io.checkpoint import ADAPTER_FILE, CONFIG_FILE, SUBSPACE_FILE
from lorasb_kernels.targets import adapted_layers
from tests.models import ARCHITECTURES, batches, build
from tests.rewriting import rewrite


def trained(architecture="roberta", seed=0, **fields):
    fields = {"r": 4, "init": "orthogonal", "seed": seed, **fields}
    model = adapt(build(architecture), LoRASBConfig(**fields), progress=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def saved(tmp_path):
    model = trained(modules_to_save=("classifier",))
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_fresh_base_model_gets_the_same_outputs(architecture, tmp_path):
    model = trained(architecture, optimal_gradient=True, scaling=0.5)
    save_adapter(model, tmp_path)
    loaded = load_adapter(build(architecture), tmp_path)
    batch = batches(architecture)[0]
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert loaded.lorasb_config == model.lorasb_config


def test_a_fresh_process_gets_the_same_bits(saved):
    model, directory = saved
    code = f"""
import sys, torch
from lorasb_kernels import load_adapter
from tests.models import batches, build
model = load_adapter(build("roberta"), {str(directory)!r})
torch.set_num_threads({torch.get_num_threads()})
torch.save(model(**batches("roberta")[0]).logits, {str(directory / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    logits = torch.load(directory / "logits.pt", weights_only=True)
    assert torch.equal(logits, model(**batches("roberta")[0]).logits)


def test_only_the_cores_are_written_again(saved):
    model, directory = saved
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).lora_R.add_(1)
    save_adapter(model, directory)
    after = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {ADAPTER_FILE}
    cores = load_file(directory / ADAPTER_FILE)
    assert all(t.dtype == torch.float32 for name, t in cores.items() if name.endswith("lora_R"))


def test_loading_into_an_adapted_model(saved):
    model, directory = saved
    other = trained(seed=1, modules_to_save=("classifier",))
    with pytest.raises(ValueError, match="the model is adapted with"):
        load_adapter(other, directory)
    twin = adapt(build("roberta"), model.lorasb_config, progress=False)
    load_adapter(twin, directory)
    batch = batches("roberta")[0]
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_low_precision_bases(tmp_path):
    model = trained("llama").bfloat16()
    save_adapter(model, tmp_path)
    batch = batches("llama")[0]
    loaded = load_adapter(build("llama").bfloat16(), tmp_path)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    load_adapter(build("llama"), tmp_path)  # the probe tolerates another precision


def test_merged_and_plain_models_are_not_saved(tmp_path):
    model = trained()
    next(iter(adapted_layers(model).values())).merge()
    with pytest.raises(ValueError, match="is merged; expected unmerge"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds no adapter"):
        save_adapter(build("roberta"), tmp_path)
    assert not list(tmp_path.iterdir())


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_record(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


CORE = "roberta.encoder.layer.0.attention.self.query.lora_R"
A = "roberta.encoder.layer.0.attention.self.query.lora_A"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda d: (d / ADAPTER_FILE).unlink(),
            FileNotFoundError,
            "adapter.safetensors is missing",
        ),
        (lambda d: (d / SUBSPACE_FILE).unlink(), FileNotFoundError, "subspace.* is missing"),
        (lambda d: (d / CONFIG_FILE).unlink(), FileNotFoundError, "lorasb_config.json is missing"),
        (lambda d: (d / CONFIG_FILE).write_text("{"), ValueError, "is not JSON"),
        (lambda d: (d / CONFIG_FILE).write_text("[]"), ValueError, "not an adapter record"),
        (lambda d: edit_record(d / CONFIG_FILE, format="9"), ValueError, "not an adapter record"),
        (
            lambda d: edit_record(d / CONFIG_FILE, config={"r": 4, "code": "x"}),
            ValueError,
            r"unknown fields \['code'\]",
        ),
        (
            lambda d: edit_record(d / CONFIG_FILE, subspace="0" * 64),
            ValueError,
            "do not belong together",
        ),
        (
            lambda d: (d / ADAPTER_FILE).write_bytes((d / ADAPTER_FILE).read_bytes()[:-9]),
            ValueError,
            "not a whole safetensors file",
        ),
        (
            lambda d: (d / ADAPTER_FILE).write_bytes(b"\xff" * 64),
            ValueError,
            "not a whole safetensors file",
        ),
        (
            lambda d: flip_the_last_bit(d / ADAPTER_FILE),
            ValueError,
            "adapter.safetensors is damaged: its digest is another",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.pop(CORE)),
            ValueError,
            "missing tensors",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update({"../x": torch.ones(1)})),
            ValueError,
            "unexpected tensors",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update({CORE: torch.ones(3, 4)})),
            ValueError,
            r"has shape \(3, 4\); expected \(4, 4\)",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update({CORE: torch.ones(4, 4).int()})),
            ValueError,
            "has dtype torch.int32",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t[CORE].fill_(float("nan"))),
            ValueError,
            "non-finite",
        ),
        (
            lambda d: rewrite(d / SUBSPACE_FILE, lambda t: t[A].neg_()),
            ValueError,
            "damaged",
        ),
    ],
)
def test_damage_is_named_and_the_model_untouched(saved, damage, error, message):
    _, directory = saved
    damage(directory)
    base = build("roberta")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(error, match=message):
        load_adapter(base, directory)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_another_subspace_or_base_is_refused(saved, tmp_path):
    _, directory = saved
    other = trained(seed=1, modules_to_save=("classifier",))
    save_adapter(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / ADAPTER_FILE, tmp_path / "swapped")
    mixed = tmp_path / "mixed"
    shutil.copytree(directory, mixed)
    shutil.copy(tmp_path / "swapped", mixed / ADAPTER_FILE)
    with pytest.raises(ValueError, match="do not belong together"):
        load_adapter(build("roberta"), mixed)
    with pytest.raises(ValueError, match="is not the one this adapter was made for"):
        load_adapter(build("roberta", seed=5), directory)
