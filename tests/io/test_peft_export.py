"""The exported directory, loaded by the real peft into a fresh base model."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorasb_kernels import LoRASBConfig, adapt, export_peft, merge_and_unload
from lorasb_kernels.io.peft_export import ServingWarning
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build


def trained(architecture, **fields):
    fields = {"r": 4, "init": "orthogonal", "scaling": 0.5, **fields}
    model = adapt(build(architecture), LoRASBConfig(**fields), progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "roberta", "t5"])
def test_peft_computes_the_same(architecture, tmp_path):
    saved = ("classifier",) if architecture == "roberta" else ()
    model = trained(architecture, modules_to_save=saved)
    export_peft(model, tmp_path)
    loaded = PeftModel.from_pretrained(build(architecture), tmp_path)
    batch = batches(architecture)[0]
    with torch.no_grad():
        expected, plain = model(**batch).logits, build(architecture)(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected)
        assert (plain - expected).abs().max() > 1e-3  # the adapter does something
        if architecture != "roberta":
            prompt = {"input_ids": batch["input_ids"][1:], "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected)
        ours = dict(merge_and_unload(model).named_parameters())
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(parameter, ours[name])


def test_the_directory_is_standard(tmp_path):
    model = trained("llama", target_modules=("q_proj", "down_proj"))
    export_peft(model, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["lora_alpha"] == config["r"] == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{side}.weight"
        for name in adapted_layers(model)
        for side in "AB"
    }


def test_names_that_would_select_more_are_spelled_out(tmp_path):
    model = trained("llama", target_modules=r".*layers\.1.*q_proj")
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_saved_modules_can_be_left_behind(tmp_path):
    model = trained("roberta", modules_to_save=("classifier",))
    export_peft(model, tmp_path, saved_modules=False)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "classifier" in k]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


@pytest.mark.parametrize(("rank", "written"), [("vllm", 8), (5, 5), (4, 4), (None, 4)])
def test_a_padded_rank_is_the_same_adapter(rank, written, tmp_path):
    model = trained("llama")
    export_peft(model, tmp_path, rank=rank)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert {m.r["default"] for m in loaded.modules() if hasattr(m, "lora_A")} == {written}
    batch = batches("llama")[0]
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_the_base_can_be_named(tmp_path):
    export_peft(trained("llama"), tmp_path, base_model="someone/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"


def test_what_servers_will_not_take_is_said(tmp_path):
    model = trained("llama", modules_to_save=("norm",))
    with pytest.warns(ServingWarning, match="vLLM will refuse the adapter for the whole modules n"):
        export_peft(model, tmp_path)
    with pytest.warns(ServingWarning, match="rank is 600, and --max-lora-rank ends at 512"):
        export_peft(model, tmp_path, saved_modules=False, rank=600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_peft(model, tmp_path, saved_modules=False)
        export_peft(trained("roberta", modules_to_save=("classifier",)), tmp_path)


def test_what_cannot_be_exported_writes_nothing(tmp_path):
    model = trained("llama")
    layer = next(iter(adapted_layers(model).values()))
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; expected one of torch\.float32"):
        export_peft(model, tmp_path, dtype=torch.int8)
    for rank in (3, "sglang"):
        with pytest.raises(ValueError, match=f"rank is {rank!r}; expected .vllm. or an integer"):
            export_peft(model, tmp_path, rank=rank)
    with torch.no_grad():
        layer.lora_R[0, 0] = 1e9
    with pytest.raises(ValueError, match=r"is not finite in torch\.float16; nothing"):
        export_peft(model, tmp_path, dtype=torch.float16)
    layer.merge()
    with pytest.raises(ValueError, match="is merged; expected unmerge"):
        export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="holds no adapter"):
        export_peft(build("llama"), tmp_path)
    assert not list(tmp_path.iterdir())
