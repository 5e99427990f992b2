"""`save_pretrained` and the real Trainer on adapted models: what is written, reloaded, resumed."""

import copy
import gc
import json
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, merge_and_unload
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

FILES = {
    "lorasb_config.json",
    "subspace.safetensors",
    "adapter.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "README.md",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Base models on disk, as `from_pretrained` needs them."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "roberta"):
        build(name).save_pretrained(folder / name)
    return folder


def base(bases, name):
    kind = AutoModelForSequenceClassification if name == "roberta" else AutoModelForCausalLM
    return kind.from_pretrained(bases / name).eval()


def trained(bases, name="llama", **settings):
    settings = {"r": 4, "init": "orthogonal", **settings}
    model = adapt(base(bases, name), LoRASBConfig(**settings), progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, name="llama"):
    with torch.no_grad():
        return model.eval()(**batches(name)[0]).logits


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("llama", {"init": "lora"}), ("roberta", {"modules_to_save": ("classifier",)})],
)
def test_from_pretrained_and_load_adapter_give_the_trained_model(bases, tmp_path, name, settings):
    model = trained(bases, name, **settings)
    expected = logits(model, name)
    assert (expected - logits(base(bases, name), name)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    torch.testing.assert_close(logits(load_adapter(base(bases, name), tmp_path), name), expected)
    reloaded = type(base(bases, name)).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded, name), expected)
    auto = AutoModelForCausalLM if name == "llama" else AutoModelForSequenceClassification
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path), name), expected)


def rows():
    return [
        {name: tensor[row] for name, tensor in batch.items()}
        for batch in batches("llama", 4)
        for row in range(3)
    ]


def trainer(model, folder, **options):
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "seed": 3, **options}
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, settings, train_dataset=rows(), eval_dataset=rows()[:3])


def test_checkpoints_of_the_trainer_hold_the_adapter_and_resume(bases, tmp_path):
    model = trained(bases)
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(tmp_path / "saved")
    expected = logits(model)
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= FILES
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        assert not (folder / "config.json").exists()
        keys = set(adapted_layers(model))
        torch.testing.assert_close(logits(load_adapter(base(bases, "llama"), folder)), expected)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(reloaded), expected)
    # A model adapted from another seed: A, B and R all come from the checkpoint.
    again = trained(bases, seed=9)
    trainer(again, tmp_path / "run").train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
    )
    assert torch.equal(logits(again), expected)
    assert set(adapted_layers(again)) == keys


def test_the_best_checkpoint_is_loaded(bases, tmp_path):
    """With a learning rate that makes it worse, the best is the first."""
    model = trained(bases)
    run = trainer(
        model,
        tmp_path,
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        learning_rate=1.0,
    )
    run.train()
    best = run.state.best_model_checkpoint
    losses = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert best.endswith(f"checkpoint-{1 + losses.index(min(losses))}")
    reloaded = load_adapter(base(bases, "llama"), best)
    assert torch.equal(logits(reloaded), logits(model))


def test_after_merging_the_whole_model_is_written(bases, tmp_path):
    model = trained(bases)
    expected = logits(model)
    merge_and_unload(model).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_saves_itself(bases, tmp_path):
    model = trained(bases)
    twin = copy.deepcopy(model)
    next(iter(adapted_layers(model).values())).lora_R.data.zero_()
    twin.save_pretrained(tmp_path)
    reloaded = load_adapter(base(bases, "llama"), tmp_path)
    assert torch.equal(logits(reloaded), logits(twin))
    assert not torch.equal(logits(reloaded), logits(model))


def test_a_model_read_from_a_pickle_saves_itself(bases, tmp_path):
    model = trained(bases)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    twin.save_pretrained(tmp_path / "twin")
    reloaded = load_adapter(base(bases, "llama"), tmp_path / "twin")
    assert torch.equal(logits(reloaded), logits(model))


def test_a_model_is_freed_at_once(bases):
    """Without waiting for the garbage collector, as GPU memory must be."""
    model = trained(bases)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_what_cannot_be_meant_is_refused(bases, tmp_path):
    model = trained(bases)
    with pytest.raises(ValueError, match=r"expected save_pretrained\(folder\), then"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds a model; expected a folder of the adapter's own"):
        model.save_pretrained(tmp_path / "model")
    next(iter(adapted_layers(model).values())).merge()
    with pytest.raises(ValueError, match=r"is merged; expected unmerge\(\) .*merge_and_unload"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    trained(bases).save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
