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


def test_paths_never_reach_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert local_folder(tmp_path, ("*",)) == tmp_path
    for path in (tmp_path / "missing", str(tmp_path / "missing"), "a/b/c", "./missing/x"):
        with pytest.raises(FileNotFoundError, match="expected a folder or a hub repository id"):
            load_adapter(build("llama"), path)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_adapter(build("llama"), "someone/adapter")
