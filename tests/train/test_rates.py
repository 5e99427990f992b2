"""η by both rules, a head's own learning rate, random batches."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.methods import prepare
from lorasb_kernels.train.settings_file import resolve
from lorasb_kernels.train.trainer import AdapterTrainer, initial_step, training_arguments
from tests.train.conftest import reviews, tiny_config


@pytest.mark.parametrize(
    ("preset", "samples", "published", "times"),
    [("arithmetic", 50_000, 3.0e-7, 10), ("commonsense", 170_420, 2.9e-6, 14)],
)
def test_eta_of_the_public_code_and_of_the_first_step(tmp_path, preset, samples, published, times):
    """Its steps are counted with the batch of the estimation, 3 and 10, not with the training's."""
    settings = {"preset": preset, "model": "m", "data": "d", "output_dir": str(tmp_path)}
    settings["dtype"] = "float32"  # transformers refuses bf16 on a CPU without it
    config = resolve(settings)
    own = resolve(settings | {"eta_rule": "first-step"})
    arguments = training_arguments(config)
    assert initial_step(config, arguments, samples) == pytest.approx(published, rel=0.02)
    assert initial_step(own, arguments, samples) == pytest.approx(published * times, rel=0.1)


def trainer_of(bert, tokenizer, tmp_path, **settings) -> AdapterTrainer:
    config = tiny_config(bert, tmp_path, task="classification", method="lora-xs", **settings)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    samples = Encoder(tokenizer, 32).labelled(reviews(64))
    model = prepare(model, config, samples, 0, 1e-3, progress=False)
    return AdapterTrainer(config, model=model, train_dataset=samples)


def test_a_head_learns_at_its_own_rate(bert, tokenizer, tmp_path):
    trainer = trainer_of(
        bert, tokenizer, tmp_path, learning_rate=1e-3, head_learning_rate=7e-2, weight_decay=0.1
    )
    trainer.create_optimizer()
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for name, own in trainer.model.named_parameters()
        if any(own is p for p in group["params"])
    }
    assert rates["classifier.weight"] == rates["classifier.bias"] == 7e-2
    cores = {rate for name, rate in rates.items() if name.endswith("lora_R")}
    assert cores == {1e-3}
    assert rates.keys() == trainer.trained_parameters().keys()
    decayed = {
        name: group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for name, own in trainer.model.named_parameters()
        if any(own is p for p in group["params"])
    }
    assert (decayed["classifier.weight"], decayed["classifier.bias"]) == (0.1, 0.0)


def test_random_batches_do_not_look_at_lengths(bert, tokenizer, tmp_path):
    """Grouped, the samples of a step differ by a token or two in length; at random they do not."""

    def spread(batching: str) -> float:
        trainer = trainer_of(bert, tokenizer, tmp_path / batching, batching=batching)
        order = list(trainer._get_train_sampler())
        assert sorted(order) == list(range(64))
        lengths = torch.tensor([len(trainer.train_dataset[i].input_ids) for i in order])
        return lengths.view(8, 8).double().std(1).mean().item()

    assert spread("random") > 2 * spread("length-grouped")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_learning_rate": 1e-3}, "expected task classification"),
        ({"eta_rule": "published", "warmup_ratio": 0.0}, "expected a warmup_ratio above 0"),
        ({"eta_rule": "mine"}, "eta_rule is 'mine'; expected one of first-step, published"),
        ({"init_from": "x", "method": "full"}, "init_from is given with method 'full'"),
        ({"sigma_side": "C"}, "sigma_side is 'C'; expected one of B, A"),
        ({"core_std": -1.0}, "core_std is -1.0"),
        ({"init_batch_size": 0}, "init_batch_size is 0"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        resolve({"model": "m", "data": "d", "output_dir": "o", **settings})
    assert message in str(error.value)
