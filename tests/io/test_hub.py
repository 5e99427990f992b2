"""Adapters by hub repository id, through the real huggingface_hub and a cache on disk."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorasb_kernels import LoRASBConfig, Subspace, adapt, load_adapter, save_adapter
from lorasb_kernels.io.hub import local_folder
from lorasb_kernels.targets import adapted_layers
from tests.io.local_hub import local_hub
from tests.models import batches, build

LOAD = """
import torch
from lorasb_kernels import load_adapter
from tests.models import batches, build
with torch.no_grad():
    for name in ("someone/adapter", "someone/tenant"):
        model = load_adapter(build("llama"), name)
        print(model(**batches("llama")[0]).logits.double().sum().item())
    load_adapter(build("llama"), "someone/else")
"""


def put_into_the_cache(folder, cache, name):
    repository = cache / f"models--someone--{name}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def outputs(model):
    with torch.no_grad():
        return model(**batches("llama")[0]).logits.double().sum().item()


def test_repositories_in_the_cache_load_offline(tmp_path):
    """An adapter, and one of its subspace in a repository of its own, which names the first."""
    model = adapt(build("llama"), LoRASBConfig(r=4, init="lora-xs", core_std=0.3), progress=False)
    save_adapter(model, tmp_path / "adapter")
    expected = [outputs(model)]
    subspace = replace(Subspace.load(tmp_path / "adapter"), hub_id="someone/adapter")
    for layer in adapted_layers(model).values():
        layer.lora_R.data.mul_(2)
    save_adapter(model, tmp_path / "tenant", subspace=subspace)
    expected.append(outputs(model))
    for name in ("adapter", "tenant"):
        put_into_the_cache(tmp_path / name, tmp_path / "cache", name)
    # The hub client reads its environment at import, hence a new process.
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False
    )
    printed = [float(line) for line in done.stdout.splitlines()]
    assert printed == pytest.approx(expected, rel=1e-5), done.stderr
    message = "FileNotFoundError: 'someone/else' is no folder here, and the hub repository"
    assert message in done.stderr


PUSH = """
import torch
from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build
model = adapt(build("llama"), LoRASBConfig(r=4, init="orthogonal"), progress=False)
torch.manual_seed(0)
for layer in adapted_layers(model).values():
    layer.lora_R.data.normal_(std=0.3)
model.push_to_hub("someone/adapter", token="none", tags=["mine"])
with torch.no_grad():
    print(model(**batches("llama")[0]).logits.double().sum().item())
"""

PULL = """
import torch
from lorasb_kernels import load_adapter
from tests.models import batches, build
with torch.no_grad():
    for model in (load_adapter(build("llama"), "someone/adapter"), build("llama")):
        print(model(**batches("llama")[0]).logits.double().sum().item())
"""


def with_the_hub(script, hub, home):
    """What a new process prints, whose hub is `hub`: the client reads its environment at import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
    }
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.splitlines()]


def test_pushed_and_loaded_by_somebody_else(tmp_path):
    with local_hub() as hub:
        (pushed,) = with_the_hub(PUSH, hub, tmp_path / "mine")
        files = hub.repositories["someone/adapter"]
        loaded, plain = with_the_hub(PULL, hub, tmp_path / "theirs")
        assert loaded == pytest.approx(pushed, rel=1e-5)
        assert plain != pytest.approx(pushed, rel=1e-3)
        assert {"adapter.safetensors", "lorasb_config.json", "subspace.safetensors"} <= set(files)
        card = files["README.md"].decode()
        assert "# orthogonal adapter of" in card
        assert "- mine" in card
        files["README.md"] = b"mine"
        with_the_hub(PUSH, hub, tmp_path / "mine")
        assert files["README.md"] == b"mine"


def test_paths_never_reach_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert local_folder(tmp_path, ("*",)) == tmp_path
    for path in (tmp_path / "missing", str(tmp_path / "missing"), "a/b/c", "./missing/x"):
        with pytest.raises(FileNotFoundError, match="expected a folder or a hub repository id"):
            load_adapter(build("llama"), path)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_adapter(build("llama"), "someone/adapter")
