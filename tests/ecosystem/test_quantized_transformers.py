"""Quantized models as transformers loads them, adapted, trained by `Trainer`, saved and merged."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from lorasb_kernels import LoRASBConfig, adapt, merge_and_unload, merge_checkpoint, save_adapter
from lorasb_kernels.init import EstimationOptions, estimate_gradients
from lorasb_kernels.integrations.peft import LoRASBPeftConfig, initialize_from_gradients
from lorasb_kernels.quantization import quantization_of
from lorasb_kernels.targets import adapted_layers, find_targets
from tests.models import batches, build

CONFIGS = {
    "bitsandbytes nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao Int8Tensor": TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def load(base, kind):
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=CONFIGS[kind], device_map="cpu", dtype=torch.float32
    )


def logits(model):
    with torch.no_grad():
        return model(**batches("llama")[0]).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_model_is_adapted_generates_and_merges(base, kind, tmp_path):
    model = adapt(
        load(base, kind), LoRASBConfig(r=4), batches("llama"), learning_rate=1e-2, progress=False
    )
    layers = adapted_layers(model)
    assert len(layers) == 14
    assert {quantization_of(layer) for layer in layers.values()} == {kind}
    assert all(layer.lora_R.any() for layer in layers.values())
    prompt = batches("llama")[0]["input_ids"][1:]
    tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, prompt.shape[1] + 4)
    before = logits(model)
    merge_and_unload(model, dequantize=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(model) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trainer_trains_it_through_peft(base, kind, tmp_path):
    model = prepare_model_for_kbit_training(load(base, kind), use_gradient_checkpointing=False)
    model = get_peft_model(model, LoRASBPeftConfig(r=4, target_modules="all-linear"))
    initialize_from_gradients(model, batches("llama"), 1e-2, progress=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 14
    rows = [{key: value[1] for key, value in batch.items()} for batch in batches("llama", 4)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, settings, train_dataset=rows).train()
    parameters = dict(model.named_parameters())
    assert all(not torch.equal(parameters[name], start) for name, start in before.items())
    loaded = PeftModel.from_pretrained(load(base, kind), tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    with pytest.raises(ValueError, match=rf"is quantized \({kind}\); expected the adapter"):
        model.merge_and_unload()


def test_the_trainer_refuses_it_without_peft(base, tmp_path):
    """Its own rule, which `docs/quantized.md` describes."""
    model = adapt(
        load(base, "bitsandbytes nf4"), LoRASBConfig(r=4, init="orthogonal"), progress=False
    )
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_merging_on_disk_into_a_quantized_model_is_refused(base, tmp_path):
    model = load(base, "bitsandbytes nf4")
    model.save_pretrained(tmp_path / "quantized")
    save_adapter(
        adapt(model, LoRASBConfig(r=4, init="orthogonal"), progress=False), tmp_path / "adapter"
    )
    arguments = (tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"dtype torch\.uint8, so the base model is quantized"):
        merge_checkpoint(tmp_path / "quantized", *arguments, progress=False)
    merge_checkpoint(base, *arguments, progress=False)


def test_estimation_leaves_the_other_quantized_layers_differentiable(base):
    model = load(base, "bitsandbytes nf4")
    targets = list(find_targets(model, ("q_proj",)))
    first = dict(estimate_gradients(model, batches("llama"), targets))
    again = dict(
        estimate_gradients(
            model, batches("llama"), targets, EstimationOptions(strategy="layerwise")
        )
    )
    for name, gradient in first.items():
        assert gradient.any()
        torch.testing.assert_close(again[name], gradient)
