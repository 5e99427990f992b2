"""Adapters by hub repository id, through the real huggingface_hub and a cache on disk."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from lorasb_kernels.io.hub import local_folder
from tests.models import batches, build

LOAD = """
import sys, torch
from lorasb_kernels import load_adapter
from tests.models import batches, build
with torch.no_grad():
    model = load_adapter(build("llama"), "someone/adapter")
    print(model(**batches("llama")[0]).logits.double().sum().item())
    load_adapter(build("llama"), "someone/else")
"""


def test_a_repository_in_the_cache_loads_offline(tmp_path):
    model = adapt(build("llama"), LoRASBConfig(r=4, init="lora-xs", core_std=0.3), progress=False)
    save_adapter(model, tmp_path / "adapter")
    repository = tmp_path / "cache" / "models--someone--adapter"
    shutil.copytree(tmp_path / "adapter", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    # The hub client reads its environment at import, hence a new process.
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False
    )
    with torch.no_grad():
        expected = model(**batches("llama")[0]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5), done.stderr
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
