"""The scripts of docs/from_peft.md run, on a tiny model, and save an adapter that loads."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lorasb_kernels
from tests.train.conftest import llama, tokenizer

__all__ = ["llama", "tokenizer"]

PAGE = (Path(__file__).parents[1] / "docs" / "from_peft.md").read_text("utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HUB = re.compile(r'"HuggingFaceTB/[^"]+"')


def run(script: str, model: Path) -> dict:
    assert HUB.search(script)
    names: dict = {}
    exec(compile(HUB.sub(repr(str(model)), script), "docs/from_peft.md", "exec"), names)
    return names


@pytest.fixture
def small_rank(monkeypatch):
    """The tiny model has 32 features; everything else stays as in the page."""

    def config(**fields):
        return original(**fields | {"r": 4})

    original = lorasb_kernels.LoRASBConfig
    monkeypatch.setattr(lorasb_kernels, "LoRASBConfig", config)


def test_the_script_for_trainer(llama, tmp_path, monkeypatch, small_rank):
    monkeypatch.chdir(tmp_path)
    names = run(SCRIPTS[0], llama)
    assert names["trainer"].state.global_step == 20
    with safe_open(tmp_path / "out" / "adapter" / "model.safetensors", "pt") as file:
        saved = file.keys()
    assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B", "lora_R"}
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [names[n].eval()(tokens).logits for n in ("model", "served", "resumed")]
        base = AutoModelForCausalLM.from_pretrained(llama)(tokens).logits
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - base).abs().max() > 0.1


def test_the_script_for_trl(llama, tmp_path, monkeypatch, small_rank):
    pytest.importorskip("trl", reason="`make test-full` installs TRL")
    monkeypatch.chdir(tmp_path)
    names = run(SCRIPTS[1], llama)
    loaded = lorasb_kernels.load_adapter(
        AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out" / "adapter"
    )
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, names["model"].eval()(tokens).logits)
