"""Every method trains, lowers its loss and leaves small checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.errors import ConfigError, DataError
from lorasb_kernels.train.run import finetune
from tests.train.conftest import reviews, sums, tiny_config

ALL_METHODS = ["lora-sb", "lora-xs", "lora", "rslora", "lora-one", "lora-pro", "pissa", "dora"]
ALL_METHODS += ["lora-ga", "vera", "full"]
RATES = {"full": 5e-3, "vera": 0.2}  # VeRA trains vectors that scale frozen random matrices


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_lowers_the_loss(method, llama, tmp_path):
    rate = RATES.get(method, 2e-2)
    config = tiny_config(
        llama, tmp_path, method=method, learning_rate=rate, r=8 if method == "lora-ga" else 16
    )
    _, _, result = finetune(config, sums(96), sums(20), judge_before=True)
    losses = [loss for _, loss in result.losses]
    assert len(losses) == result.steps == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert result.after < 0.8 * result.before


def test_lora_ga_starts_from_gradients_and_changes_nothing_at_first(llama, tmp_path):
    """Its A and B follow the samples; the base is offset, so that the first loss is the base's."""

    def start(seed: int):
        folder = tmp_path / f"{seed}"
        config = tiny_config(llama, folder, method="lora-ga", learning_rate=1e-12, max_steps=1)
        rows = sums(96)[seed * 48 :][:48]
        model, _, result = finetune(config, rows, sums(20), judge_before=True)
        assert result.after == pytest.approx(result.before, rel=1e-4)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert not torch.allclose(start(0), start(1))


def test_lora_ga_needs_two_ranks_of_every_layer(llama, tmp_path):
    config = tiny_config(llama, tmp_path, method="lora-ga", r=9)
    with pytest.raises(ConfigError, match=r"r is 9; expected r <= 8 for .*k_proj.* 'lora-ga'"):
        finetune(config, sums(8))


def test_lora_pro_trains_with_its_own_optimizer(llama, tmp_path):
    config = tiny_config(llama, tmp_path, method="lora-pro", max_steps=1)
    assert config.optimizer == "lora-pro"
    with pytest.raises(ConfigError, match="optimizer is 'lora-pro' and method 'lora-sb'"):
        tiny_config(llama, tmp_path, method="lora-sb", optimizer="lora-pro")


def test_lora_sb_starts_below_lora_xs(llama, tmp_path):
    """Its initialization is already a step along the negative gradient of real samples."""

    def first_loss(method: str) -> float:
        folder = tmp_path / method
        config = tiny_config(llama, folder, method=method, max_steps=2, init_minimum=48)
        return finetune(config, sums(96))[2].losses[0][1]

    assert first_loss("lora-sb") < 0.9 * first_loss("lora-xs")


def test_estimation_takes_the_strategy_and_the_memory_budget(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lorasb_kernels.init.estimation.api.resident", lambda *_: pytest.fail("ran")
    )
    config = tiny_config(llama, tmp_path / "a", max_steps=1, init_strategy="layerwise")
    finetune(config, sums(16))
    config = tiny_config(llama, tmp_path / "b", max_steps=1, init_memory_budget=1)
    with pytest.raises(ValueError, match="memory_budget is 1; expected at least"):
        finetune(config, sums(16))


def test_lora_sb_trains_r_squared_numbers_a_layer(llama, tmp_path):
    config = tiny_config(llama, tmp_path, max_steps=2, save_steps=1)
    _, _, result = finetune(config, sums(16))
    assert result.trainable == 14 * 4 * 4
    saved = load_file(tmp_path / "checkpoint-2" / "trained.safetensors")
    assert len(saved) == 14
    assert all(name.endswith("lora_R") and saved[name].shape == (4, 4) for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_a_checkpoint_holds_no_pickle_and_a_b_lie_in_the_adapter_once(llama, tmp_path):
    config = tiny_config(llama, tmp_path, max_steps=3, save_steps=1)
    finetune(config, sums(24))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "checkpoint-2",  # the last two are kept
        "checkpoint-3",
        "config.json",
        "data.json",
        "result.json",
    ]
    suffixes = {path.suffix for path in (tmp_path / "checkpoint-3").iterdir()}
    assert suffixes == {".safetensors", ".json"}
    assert (tmp_path / "adapter" / "subspace.safetensors").exists()


@pytest.mark.parametrize("method", ["lora-sb", "full"])
def test_classification_trains_the_head_too(method, bert, tmp_path):
    config = tiny_config(
        bert, tmp_path, task="classification", method=method, learning_rate=1e-2, max_steps=16
    )
    _, _, result = finetune(config, reviews(128), reviews(40))
    assert result.after > 0.8
    if method == "lora-sb":
        saved = load_file(tmp_path / "checkpoint-16" / "trained.safetensors")
        assert {"classifier.weight", "classifier.bias"} <= saved.keys()
        assert result.trainable == 13 * 16 + 2 * 32 + 2


def test_packed_batches_train(llama, tmp_path):
    config = tiny_config(llama, tmp_path, batching="packed", batch_size=2, max_length=64)
    _, _, result = finetune(config, sums(96))
    losses = [loss for _, loss in result.losses]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_accumulation_is_a_larger_batch(llama, tmp_path):
    """The loss is a mean over all response tokens of the step, however it is split."""
    whole = finetune(tiny_config(llama, tmp_path / "a", batch_size=8), sums(48))[2]
    parts = finetune(tiny_config(llama, tmp_path / "b", batch_size=2, accumulation=4), sums(48))[2]
    # The estimation batches differ in size, which must not matter.
    torch.testing.assert_close(
        torch.tensor(parts.losses), torch.tensor(whole.losses), rtol=2e-3, atol=0
    )


def test_other_settings_do_not_continue_a_run(llama, tmp_path):
    finetune(tiny_config(llama, tmp_path, max_steps=1), sums(8))
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.5, but output_dir"):
        finetune(tiny_config(llama, tmp_path, max_steps=1, learning_rate=0.5), sums(8))


def test_a_run_of_a_version_with_fewer_settings_goes_on(llama, tmp_path):
    config = tiny_config(llama, tmp_path, max_steps=2, save_steps=1)
    first = finetune(config, sums(16))[2]
    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    for name in ("optimizer", "damping", "gamma", "use_rslora"):
        del older[name]
    path.write_text(json.dumps(older))
    assert finetune(config, sums(16))[2].losses == first.losses


def test_lora_one_trains_with_its_own_optimizer_and_resumes(llama, tmp_path):
    settings = {"method": "lora-one", "save_steps": 2, "max_steps": 4}
    whole = finetune(tiny_config(llama, tmp_path / "a", **settings), sums(32))[0]
    config = tiny_config(llama, tmp_path / "b", **settings)
    finetune(config, sums(32))
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    resumed = finetune(config, sums(32))[0]
    state = json.loads((tmp_path / "b" / "config.json").read_text())
    assert state["optimizer"] == "preconditioned"
    for own, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "preconditioned"}, "optimizer is 'preconditioned' and method 'lora-sb'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, preconditioned"),
        ({"method": "lora", "optimal_gradient": True}, "optimal_gradient is true and method"),
        ({"method": "lora-one", "gamma": 0.0}, "gamma is 0.0; expected a positive number"),
    ],
)
def test_settings_that_do_not_fit_the_method_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("model", "out", **settings)


def test_rows_that_do_not_fit_are_an_error(llama, tmp_path):
    with pytest.raises(DataError, match=r"max_length = 4 tokens cuts .* leaves out 8"):
        finetune(tiny_config(llama, tmp_path, max_length=4), sums(8))


def test_the_result_is_written(llama, tmp_path):
    _, _, result = finetune(tiny_config(llama, tmp_path, max_steps=2), sums(16), sums(4))
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["after"] == result.after
    assert [tuple(point) for point in written["losses"]] == result.losses


@pytest.mark.parametrize("method", ["pissa", "lora-ga"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_methods_that_change_the_base_are_saved_for_the_original(
    llama, tmp_path, method, use_rslora
):
    from transformers import AutoModelForCausalLM

    from lorasb_kernels import import_peft

    config = tiny_config(
        llama, tmp_path, method=method, max_steps=3, learning_rate=2e-2, r=4, use_rslora=use_rslora
    )
    model, _, _ = finetune(config, sums(24))
    ids = torch.arange(3, 15).view(2, 6)
    base = AutoModelForCausalLM.from_pretrained(llama)
    original = base(ids).logits
    imported = import_peft(base, tmp_path / "adapter", plain_lora=True)
    expected = model.eval()(ids).logits
    assert (expected - original).abs().max() > 1e-2
    torch.testing.assert_close(imported(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_head_is_saved_beside_a_converted_adapter(bert, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(bert, tmp_path, method="pissa", max_steps=3, task="classification", r=4)
    model, _, _ = finetune(config, reviews(24))
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(3, 15).view(2, 6)
    torch.testing.assert_close(reloaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_saved_adapter_is_the_trained_model(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    from lorasb_kernels import load_adapter

    model, encoder, _ = finetune(tiny_config(llama, tmp_path), sums(48))
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    batch = Collator(0)(encoder.examples(sums(4)))
    model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("method", ["lora-sb", "lora", "full"])
def test_bfloat16_weights_with_float32_training(method, bert, tmp_path):
    config = tiny_config(
        bert, tmp_path, task="classification", method=method, dtype="bfloat16", max_steps=3
    )
    model, _, result = finetune(config, reviews(24), reviews(10))
    assert 0 <= result.after <= 1
    dtypes = {p.requires_grad: set() for p in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes.pop(True) == {torch.float32}
    assert dtypes.get(False, {torch.bfloat16}) == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(llama, tmp_path):
    plain = finetune(tiny_config(llama, tmp_path / "a", max_steps=4), sums(32))[2]
    again = finetune(
        tiny_config(llama, tmp_path / "b", max_steps=4, gradient_checkpointing=True), sums(32)
    )[2]
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(plain.losses))
