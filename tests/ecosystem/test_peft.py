"""LoRA-SB as a method of the real peft: peft's own calls, this library's operation."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.integrations import peft as plug_in
from lorasb_kernels.integrations.peft import (
    LoRASBLayer,
    LoRASBPeftConfig,
    initialize_from_gradients,
)
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

TARGETS = ["q_proj", "up_proj"]
BATCH = batches("llama")[0]


def config(**fields):
    return LoRASBPeftConfig(**{"r": 4, "target_modules": TARGETS, "init": "orthogonal", **fields})


def randomize(model, adapter="default", seed=0):
    torch.manual_seed(seed)
    for layer in layers(model):
        layer.lorasb_R[adapter].data.normal_(std=0.5)


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoRASBLayer)]


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.fixture
def model():
    result = get_peft_model(build("llama"), config(scaling=0.5)).eval()
    randomize(result)
    return result


def test_it_computes_what_adapt_computes(model):
    twin = adapt(build("llama"), LoRASBConfig(4, tuple(TARGETS), "orthogonal", 0.5), progress=False)
    for theirs, ours in zip(layers(model), adapted_layers(twin).values(), strict=True):
        ours.set_adapter(
            theirs.lorasb_A["default"], theirs.lorasb_R["default"], theirs.lorasb_B["default"]
        )
    assert torch.equal(logits(model), logits(twin))


def test_the_fused_operation_runs_and_only_cores_train(model, monkeypatch):
    calls = []
    monkeypatch.setattr(plug_in, "lorasb_linear", lambda *a: calls.append(1) or lorasb_linear(*a))
    model(**BATCH).loss.backward()
    assert len(calls) == len(layers(model)) == 4
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.endswith("lorasb_R.default") for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * 4


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(model, tmp_path, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoRASBPeftConfig)
    loaded = PeftModel.from_pretrained(
        build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), logits(model))


def test_named_adapters(model, tmp_path):
    first, plain = logits(model), logits(build("llama"))
    model.add_adapter("second", config(r=8, init="lora-xs", seed=1))
    randomize(model, "second", seed=1)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("lorasb_R.second") for name in trainable)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), both)
    assert not torch.allclose(both, plain)


def test_adapters_can_be_deleted(model):
    model.add_adapter("second", config())
    model.delete_adapter("second")
    assert all(list(layer.lorasb_R) == ["default"] for layer in layers(model))


def test_disabled_merged_and_unmerged(model):
    adapted, plain = logits(model), logits(build("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    assert not layers(model)[0].merged
    torch.testing.assert_close(logits(model), adapted)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), adapted)


def test_a_low_precision_base_keeps_its_dtypes():
    model = get_peft_model(build("llama").bfloat16(), config())
    layer = layers(model)[0]
    assert layer.lorasb_R["default"].dtype == torch.float32
    assert layer.lorasb_A["default"].dtype == torch.bfloat16
    assert model.half()(**BATCH).logits.dtype == torch.float16
    assert layer.lorasb_R["default"].dtype == torch.float32


def test_gradients_initialize_as_adapt_does():
    own = LoRASBConfig(4, tuple(TARGETS))
    twin = adapt(build("llama"), own, batches("llama"), learning_rate=1e-3, progress=False)
    model = get_peft_model(build("llama"), config(init="lora-sb"))
    initialize_from_gradients(model, batches("llama"), 1e-3, progress=False)
    for theirs, ours in zip(layers(model), adapted_layers(twin).values(), strict=True):
        torch.testing.assert_close(theirs.get_delta_weight("default"), ours.get_delta_weight())
        assert ours.lora_R.any()
        assert torch.equal(theirs.lorasb_R["default"], ours.lora_R)
    with pytest.raises(ValueError, match="no LoRA-SB adapter 'other'"):
        initialize_from_gradients(model, batches("llama"), 1e-3, adapter_name="other")


def trained(model):
    """One step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**BATCH).loss.backward()
    optimizer.step()
    return model


REFUSED = "the LoRA-SB adapter 'default' has seen no gradients; expected initialize_from_gradients"


def test_lora_sb_without_gradients_does_not_train():
    model = get_peft_model(build("llama"), config(init="lora-sb"))
    assert torch.equal(logits(model), logits(build("llama")))  # without gradients it may run
    with pytest.raises(ValueError, match=REFUSED):
        trained(model)
    initialize_from_gradients(model, batches("llama"), 1e-3, progress=False)
    assert not torch.equal(logits(trained(model)), logits(build("llama")))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_lora_sb_saved_before_its_gradients_is_known_by_its_zeros(tmp_path, low_cpu_mem_usage):
    get_peft_model(build("llama"), config(init="lora-sb")).save_pretrained(tmp_path)
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.warns(UserWarning, match="'default' was saved before it saw gradients"):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, **options)
    with pytest.raises(ValueError, match=REFUSED):
        trained(loaded)


@pytest.mark.filterwarnings("error:the LoRA-SB adapter")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_lora_sb_is_trained_on_after_loading(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(build("llama"), config(init="lora-sb"))
    initialize_from_gradients(model, batches("llama"), 1e-3, progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        build("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(trained(loaded)), logits(trained(model)))


def test_what_adapt_refuses_is_refused():
    tied = build("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    hooked = build("llama")
    hooked.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    for model, target, message in (
        (tied, "lm_head", "weight is shared with another module"),
        (hooked, "q_proj", "has hooks, which would be lost"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(model, LoRASBConfig(4, (target,), "orthogonal"), progress=False)
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(target_modules=[target]))


def test_weights_that_are_stored_transposed():
    settings = {"target_modules": ["c_attn", "c_fc"], "scaling": 0.5}
    model = get_peft_model(build("gpt2"), config(**settings)).eval()
    randomize(model)
    batch = batches("gpt2")[0]
    fields = (4, ("c_attn", "c_fc"), "orthogonal", 0.5)
    twin = adapt(build("gpt2"), LoRASBConfig(*fields), progress=False)
    for theirs, ours in zip(layers(model), adapted_layers(twin).values(), strict=True):
        factors = (theirs.lorasb_A, theirs.lorasb_R, theirs.lorasb_B)
        ours.set_adapter(*(factor["default"] for factor in factors))
    expected = twin(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="r is 0; expected 1 <= r <= 512"):
        config(r=0)
    with pytest.raises(ValueError, match="init is 'noise'"):
        config(init="noise")
    with pytest.raises(ValueError, match="r is 64; expected r <= 32"):
        get_peft_model(build("llama"), config(r=64))
    with pytest.raises(TypeError, match=r"is a Embedding; expected an nn\.Linear"):
        get_peft_model(build("llama"), config(target_modules=["embed_tokens"]))
