"""`adapt`: every architecture trains, merges and restores; what cannot be adapted is refused."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from lorasb_kernels import LoRASBConfig, LoRASBLinear, adapt, describe, merge_and_unload
from lorasb_kernels.targets import adapted_layers
from tests.models import ARCHITECTURES, batches, build, few_steps

RATE = 5e-3


def adapted(architecture, **fields):
    model = build(architecture)
    config = LoRASBConfig(**{"r": 4, **fields})
    return adapt(model, config, batches(architecture), learning_rate=RATE, progress=False)


def state(model):
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "gradients": [p.grad is None for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for key in ("modules", "flags", "modes", "gradients"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_adapted_model_trains_and_merges_to_the_same_logits(architecture):
    model = adapted(architecture)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.shape == (4, 4) for p in trainable)
    assert len(trainable) == len(adapted_layers(model))
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    data = batches(architecture)
    losses = few_steps(model, optimizer, data)
    assert losses[-1] < losses[0]
    expected = model(**data[0]).logits
    merge_and_unload(model)
    assert not any(isinstance(module, LoRASBLinear) for module in model.modules())
    torch.testing.assert_close(model(**data[0]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "roberta", "t5"])
@pytest.mark.parametrize("init", ["lora-xs", "orthogonal", "noise"])
def test_other_initializations(architecture, init):
    base = build(architecture)
    model = adapted(architecture, init=init)
    data = batches(architecture)[0]
    if init == "noise":
        assert all(layer.lora_R.abs().sum() > 0 for layer in adapted_layers(model).values())
        return
    # R is 0 or about 1e-5: the model starts at the pretrained function.
    torch.testing.assert_close(model(**data).logits, base(**data).logits, rtol=1e-3, atol=1e-3)


def test_lora_sb_is_the_truncated_svd_of_the_first_sign_step():
    base = build("llama").double()
    data = batches("llama", count=3)
    model = adapt(
        copy.deepcopy(base), LoRASBConfig(4, scaling=0.5), data, learning_rate=RATE, progress=False
    )
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    for batch in data:
        for row in range(batch["input_ids"].shape[0]):
            base(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
    for name, layer in adapted_layers(model).items():
        update = -RATE * base.get_submodule(name).weight.grad.sign()
        U, S, Vt = torch.linalg.svd(update)
        best = (U[:, :4] * S[:4]) @ Vt[:4]
        delta = layer.get_delta_weight()
        # Judged by energy: where singular values nearly meet, vectors may differ.
        assert delta.norm() ** 2 > 0.9999 * best.norm() ** 2, name
        assert (update - delta).norm() < 1.0001 * (update - best).norm(), name
        torch.testing.assert_close(layer.lora_R.diagonal(), S[:4] / 0.5, rtol=1e-3, atol=0)
        identity = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, identity, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["B", "A"])
def test_lora_xs_is_the_truncated_svd_of_the_weight(side):
    base = build("llama")
    model = adapted("llama", init="lora-xs", sigma_side=side, lora_alpha=8.0)
    for name, layer in adapted_layers(model).items():
        U, S, Vt = torch.linalg.svd(base.get_submodule(name).weight.detach())
        best = (U[:, :4] * S[:4]) @ Vt[:4]
        product = layer.lora_B @ layer.lora_A
        torch.testing.assert_close(product.norm(), best.norm(), rtol=1e-4, atol=0)
        orthonormal = (
            layer.lora_A @ layer.lora_A.T if side == "B" else layer.lora_B.T @ layer.lora_B
        )
        torch.testing.assert_close(orthonormal, torch.eye(4), rtol=0, atol=1e-4)
        assert layer.scaling == 2.0
        assert 0 < layer.lora_R.abs().max() < 1e-4


def test_adapting_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = adapted("llama")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = adapted("llama")
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_modes_and_buffers_survive():
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adapt(model, LoRASBConfig(4), batches("llama"), learning_rate=RATE, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, buffer in buffers.items():
        assert torch.equal(model.get_buffer(name), buffer)
    assert all(p.grad is None for p in model.parameters())


def test_modules_to_save_are_trained_whole():
    model = adapted("roberta", modules_to_save=("classifier",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if not name.endswith("lora_R")} == {
        name for name, _ in model.named_parameters() if name.startswith("classifier.")
    }
    assert not any(name.startswith("classifier") for name in adapted_layers(model))


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (("q_proj", "self_attn.v_proj"), {"q_proj", "v_proj"}),
        (
            r".*\.layers\.1\..*_proj",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (("lm_head",), {"lm_head"}),
    ],
)
def test_targets(target_modules, expected):
    model = adapted("llama", target_modules=target_modules, init="orthogonal")
    names = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in names} == expected
    if target_modules == r".*\.layers\.1\..*_proj":
        assert all(".layers.1." in name for name in names)


def test_all_linear_leaves_heads_alone():
    for architecture in ("bert", "roberta", "t5", "gpt_neox"):
        names = adapted_layers(adapted(architecture, init="orthogonal"))
        assert not any(
            part in name for name in names for part in ("classifier", "lm_head", "embed_out")
        )


def tied_llama():
    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    return hf.AutoModelForCausalLM.from_config(config)


def shared_linear():
    linear = nn.Linear(8, 8)
    return nn.ModuleDict({"first": linear, "second": linear})


def hooked():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    return model


def meta_llama():
    with torch.device("meta"):
        return build("llama")


def quantized():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "fields", "error", "message"),
    [
        (lambda: build("llama"), {"target_modules": ("qproj",)}, ValueError, "'qproj' matched no"),
        (lambda: build("llama"), {"target_modules": ("q_proj", "w")}, ValueError, "'w' matched no"),
        (lambda: build("llama"), {"target_modules": "nothing.*"}, ValueError, "matched no linear"),
        (
            lambda: build("llama"),
            {"r": 17, "target_modules": ("k_proj",)},
            ValueError,
            "r is 17; expected r <= 16 for model.lay",
        ),
        (lambda: build("llama"), {"modules_to_save": ("head",)}, ValueError, "'head' matches no"),
        (lambda: adapted("llama"), {}, ValueError, "adapted already"),
        (tied_llama, {"target_modules": ("lm_head",)}, ValueError, "lm_head.weight is shared"),
        (shared_linear, {"target_modules": ("first",)}, ValueError, "first.weight is shared"),
        (hooked, {}, ValueError, "0 has hooks"),
        (meta_llama, {}, ValueError, "is on the meta device"),
        (quantized, {}, TypeError, "0.weight is a Tensor of torch.int8"),
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), {}, TypeError, "expected a plain nn"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_untouched(make, fields, error, message):
    model = make()
    before = state(model)
    config = LoRASBConfig(**{"r": 4, "init": "orthogonal", **fields})
    with pytest.raises(error, match=message):
        adapt(model, config, progress=False)
    after = state(model)
    if message == "is on the meta device":
        before["tensors"] = after["tensors"] = {}
    assert_same_state(before, after)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "batches is None; expected batches, as init='lora-sb' needs gradients"),
        ({"batches": []}, ValueError, "batches"),
        ({"batches": batches("llama")}, TypeError, "learning_rate is None; expected a number"),
        ({"batches": batches("llama"), "learning_rate": 0}, ValueError, "learning_rate is 0"),
        ({"batches": batches("llama"), "learning_rate": float("nan")}, ValueError, "is nan"),
    ],
)
def test_bad_estimation_arguments_leave_the_model_untouched(arguments, error, message):
    model = build("llama")
    before = state(model)
    arguments = {"learning_rate": None, **arguments}
    if arguments.get("batches") == []:
        arguments["learning_rate"] = RATE
    with pytest.raises(error, match=message):
        adapt(model, LoRASBConfig(4), progress=False, **arguments)
    assert_same_state(before, state(model))


def test_arguments_of_the_wrong_type_are_named():
    with pytest.raises(TypeError, match="model is a dict; expected"):
        adapt({}, LoRASBConfig(4))
    with pytest.raises(TypeError, match="config is a dict; expected a LoRASBConfig"):
        adapt(build("llama"), {"r": 4})


def test_merge_and_unload_needs_adapters_and_finite_ones():
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_and_unload(build("llama"))
    model = adapted("llama", init="orthogonal")
    layers = list(adapted_layers(model).values())
    with torch.no_grad():
        layers[-1].lora_R.fill_(float("inf"))
    weight = layers[0].weight.clone()
    with pytest.raises(ValueError, match="nothing was merged"):
        merge_and_unload(model, safe_merge=True)
    assert torch.equal(layers[0].weight, weight)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAPER_MODELS = {
    "mistral-7b": (hf.MistralConfig(vocab_size=32000, num_key_value_heads=8), SEVEN, 96, 2_064_384),
    "gemma-2-9b": (
        hf.Gemma2Config(
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
        ),
        SEVEN,
        96,
        2_709_504,
    ),
    "llama-3.2-3b": (
        hf.LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        SEVEN,
        96,
        1_806_336,
    ),
    "roberta-large": (
        hf.RobertaConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
        ("query", "key", "value", "attention.output.dense"),
        24,
        55_296,
    ),
}


@pytest.mark.parametrize("name", sorted(PAPER_MODELS))
def test_trainable_counts_are_the_papers(name):
    config, targets, r, expected = PAPER_MODELS[name]
    with torch.device("meta"):
        if name == "roberta-large":
            model = hf.AutoModelForSequenceClassification.from_config(config)
        else:
            model = hf.AutoModelForCausalLM.from_config(config)
    description = describe(model, LoRASBConfig(r, targets))
    assert description.trainable == expected
    assert f"{expected:,}" in str(description)


def test_describe_before_and_after_agree():
    model = build("roberta")
    config = LoRASBConfig(4, modules_to_save=("classifier",), init="orthogonal")
    planned = describe(model, config)
    done = describe(adapt(model, config, progress=False))
    assert planned == done
    assert done.trainable + done.other_trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    with pytest.raises(ValueError, match="holds no adapter"):
        describe(build("llama"))
    with pytest.raises(ValueError, match="r is 17"):
        describe(build("llama"), LoRASBConfig(17, ("k_proj",)))
