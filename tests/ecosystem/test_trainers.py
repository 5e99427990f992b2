"""An adapted model with the real Trainer, SFTTrainer, autocast and torch.compile."""

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lorasb_kernels import LoRASBConfig, PackedCores, adapt
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

CONFIG = LoRASBConfig(r=4, init="orthogonal")


def adapted(architecture="llama", **options):
    model = build(architecture)
    for name, value in options.items():
        setattr(model.config, name, value)
    model = adapt(model, CONFIG, progress=False)
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.normal_(std=0.1)
    return model


def cores(model):
    return torch.cat(
        [layer.lora_R.detach().reshape(-1) for layer in adapted_layers(model).values()]
    )


def rows():
    return [
        {name: tensor[row] for name, tensor in batch.items()}
        for batch in batches("llama", 4)
        for row in range(3)
    ]


def arguments(folder, **options):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }


def run_trainer(model, folder, optimizer=None, **options):
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = cores(model)
    settings = TrainingArguments(**arguments(folder, **options))
    Trainer(model, settings, train_dataset=rows(), optimizers=(optimizer, None)).train()
    assert not torch.equal(before, cores(model))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    return cores(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The cores after the real Trainer's run with default settings."""
    return run_trainer(adapted(), tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(trained, tmp_path, reentrant):
    model = adapted()
    if reentrant:  # as for any model whose embeddings are frozen
        model.enable_input_require_grads()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again = run_trainer(model, tmp_path, gradient_checkpointing=True, **options)
    torch.testing.assert_close(again, trained)


def test_a_packed_optimizer_gives_the_same(trained, tmp_path):
    model = adapted()
    packed = PackedCores(model)
    optimizer = torch.optim.AdamW([packed.parameter], lr=1e-2, weight_decay=0.0)
    torch.testing.assert_close(run_trainer(model, tmp_path, optimizer), trained)


def test_bf16_autocast_in_the_trainer(trained, tmp_path):
    start = cores(adapted())
    update = run_trainer(adapted(), tmp_path, bf16=True) - start
    # Adam makes a full step of a gradient near 0, so single elements may differ.
    assert torch.cosine_similarity(update, trained - start, dim=0) > 0.9


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is in the extra [full]")
    datasets = pytest.importorskip("datasets")
    from tests.ecosystem.tokenizer import tiny_tokenizer

    model = adapted()
    before = cores(model)
    data = datasets.Dataset.from_list([{"text": f"word {i} word"} for i in range(8)])
    settings = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=16))
    trl.SFTTrainer(
        model, args=settings, train_dataset=data, processing_class=tiny_tokenizer()
    ).train()
    assert not torch.equal(before, cores(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    model, batch = adapted(), batches("llama")[0]
    model(**batch).loss.backward()
    expected = [layer.lora_R.grad.clone() for layer in adapted_layers(model).values()]
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**batch).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for layer, reference in zip(adapted_layers(model).values(), expected, strict=True):
        assert layer.lora_R.grad.dtype == torch.float32
        error = (layer.lora_R.grad - reference).norm() / reference.norm()
        assert error < 0.1
    before = cores(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # nothing overflowed
    assert not torch.equal(before, cores(model))


@pytest.mark.parametrize("architecture", ["llama", pytest.param("roberta", marks=pytest.mark.slow)])
def test_a_whole_model_compiles_to_one_graph(architecture):
    model, batch = adapted(architecture), batches(architecture)[0]
    if architecture == "llama":
        model.model.layers = model.model.layers[:1]  # tracing is slow
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(**batch).logits
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    gradients = [layer.lora_R.grad for layer in adapted_layers(model).values()]
    model.zero_grad()
    expected.square().sum().backward()
    for ours, layer in zip(gradients, adapted_layers(model).values(), strict=True):
        torch.testing.assert_close(ours, layer.lora_R.grad)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_compiles_a_whole_model():
    model, batch = adapted(), batches("llama")[0]
    model.model.layers = model.model.layers[:1]  # a minute or two even so
    layers = adapted_layers(model).values()
    expected = model(**batch)
    expected.loss.backward()
    gradients = [layer.lora_R.grad for layer in layers]
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(**batch)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    for layer, gradient in zip(layers, gradients, strict=True):
        torch.testing.assert_close(layer.lora_R.grad, gradient)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_and_without_the_cache(attention):
    model = adapted(_attn_implementation=attention)
    prompt = {"input_ids": batches("llama")[0]["input_ids"][1:], "do_sample": False}
    prompt |= {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    cached = model.generate(**prompt, use_cache=True)
    assert cached.shape[1] == prompt["input_ids"].shape[1] + 8
    assert torch.equal(cached, model.generate(**prompt, use_cache=False))
