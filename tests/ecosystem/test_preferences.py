"""DPO and GRPO of TRL on an adapted model; the reference policy is its own base."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, adapters_disabled, reference_model
from lorasb_kernels.targets import adapted_layers
from tests.ecosystem.tokenizer import tiny_tokenizer
from tests.models import build

trl = pytest.importorskip("trl", reason="`make test-full` installs TRL")
datasets = pytest.importorskip("datasets")

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def adapted():
    return adapt(build("llama"), LoRASBConfig(r=4, init="orthogonal"), progress=False)


def cores(model):
    return torch.cat([c.lora_R.detach().flatten() for c in adapted_layers(model).values()])


def dpo_losses(model, reference, folder):
    pairs = [
        {"prompt": f"word {i}", "chosen": " word", "rejected": " other word"} for i in range(6)
    ]
    trainer = trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(str(folder), max_length=16, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_against_its_own_base_is_dpo_against_a_copy(tmp_path):
    model, base = adapted(), build("llama")
    twin = copy.deepcopy(model)
    losses = dpo_losses(model, reference_model(model), tmp_path / "own")
    assert losses == dpo_losses(twin, base, tmp_path / "copy")
    assert len(set(losses)) == 3
    assert torch.equal(cores(model), cores(twin))
    ids = torch.arange(3, 11)[None]
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, base.eval()(ids).logits)


def test_grpo(tmp_path):
    model = adapted()
    before = cores(model)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, **SETTINGS),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"word {i}"} for i in range(6)]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert not torch.equal(before, cores(model))
