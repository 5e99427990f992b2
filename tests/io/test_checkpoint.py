"""Saving and loading adapters: bit for bit in a new process; damaged files are refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from lorasb_kernels.io.model_card import CARD_FILE
from lorasb_kernels.io.record import CONFIG_FILE
from lorasb_kernels.io.subspace import ADAPTER_FILE, SUBSPACE_FILE
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


def test_equal_adapters_are_equal_files_in_any_process(tmp_path):
    code = """
import sys
from pathlib import Path
from tests.trust.hostile_files import write_adapter
write_adapter(Path(sys.argv[1]), "orthogonal")
"""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in "12"
    )
    assert one.keys() == {CONFIG_FILE, SUBSPACE_FILE, ADAPTER_FILE, CARD_FILE}
    assert one == two


def test_only_the_cores_are_written_again(saved):
    model, directory = saved
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).lora_R.add_(1)
    save_adapter(model, directory)
    after = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {ADAPTER_FILE}
    cores = load_file(directory / ADAPTER_FILE)["cores"]
    assert cores.shape == (len(adapted_layers(model)), 4, 4)
    assert cores.dtype == torch.float32


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


def test_a_merged_layer_is_not_loaded_into(saved):
    model, directory = saved
    *_, last = adapted_layers(model).values()
    last.merge()
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).lora_R.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is merged; expected unmerge\(\) before loading"):
        load_adapter(model, directory)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_record(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


def edit_config(directory, **changes):
    """Other settings, with the fingerprint that the adapter was saved with."""
    config = json.loads((directory / CONFIG_FILE).read_text())["config"]
    edit_record(directory / CONFIG_FILE, config={**config, **changes})


HEAD = "classifier.dense.bias"
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
            lambda d: edit_config(d, lora_alpha=18),
            ValueError,
            "lorasb_config.json is not as it was saved: its fingerprint is another",
        ),
        (lambda d: edit_record(d / CONFIG_FILE, layers=["x"]), ValueError, "not as it was saved"),
        (
            lambda d: edit_record(d / CONFIG_FILE, layers="x"),
            ValueError,
            "expected a list of names",
        ),
        (lambda d: edit_record(d / CONFIG_FILE, layers=["x", "x"]), ValueError, "a name twice"),
        (lambda d: edit_record(d / CONFIG_FILE, fingerprint=None), ValueError, "'fingerprint'"),
        (
            lambda d: edit_record(d / CONFIG_FILE, base_model=[1]),
            ValueError,
            r"base_model is \[1\]",
        ),
        (
            lambda d: edit_record(d / CONFIG_FILE, subspace="0" * 64),
            ValueError,
            "not as it was saved",
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
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.pop("cores")),
            ValueError,
            "missing tensors",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update({"../x": torch.ones(1)})),
            ValueError,
            "unexpected tensors",
        ),
        (
            lambda d: rewrite(
                d / ADAPTER_FILE, lambda t: t.update({A.replace("_A", "_R"): torch.ones(4, 4)})
            ),
            ValueError,
            "lora_R is there beside cores; expected each R once",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update(cores=torch.ones(12, 3, 4))),
            ValueError,
            r"cores has shape \(12, 3, 4\); expected \(12, 4, 4\)",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update(cores=t["cores"][1:])),
            ValueError,
            r"cores has shape \(11, 4, 4\); expected \(12, 4, 4\)",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update({HEAD: torch.ones(3)})),
            ValueError,
            r"has shape \(3,\); expected \(32,\)",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t.update(cores=t["cores"].int())),
            ValueError,
            "has dtype torch.int32",
        ),
        (
            lambda d: rewrite(d / ADAPTER_FILE, lambda t: t["cores"].fill_(float("nan"))),
            ValueError,
            "non-finite",
        ),
        (
            lambda d: rewrite(d / SUBSPACE_FILE, lambda t: t[A].neg_()),
            ValueError,
            "do not belong together",
        ),
        (lambda d: flip_the_last_bit(d / SUBSPACE_FILE), ValueError, "damaged"),
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
