"""Evaluation after every epoch, and the best one kept, across restarts."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lorasb_kernels import load_adapter
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.run import finetune
from lorasb_kernels.train.samples import Labelled
from lorasb_kernels.train.selection import best_epoch
from lorasb_kernels.train.settings_file import resolve
from tests.train.conftest import reviews, tiny_config

EPOCHS = 4


def run(bert, folder, callbacks=(), **changes):
    settings = {"task": "classification", "method": "lora-xs", "save_steps": 3, "epochs": EPOCHS}
    settings |= {"max_steps": None, "learning_rate": 3e-3, "evaluate_every": "epoch"}
    config = tiny_config(bert, folder, **(settings | changes))
    # Judged by the opposite of what is learnt, so that the best epoch is not the last one.
    rows = [Labelled(row.text, 1 - row.label) for row in reviews(20)]
    model, _, result = finetune(config, reviews(32), rows, callbacks=callbacks)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return trained, result


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    """A run in one go that keeps the best epoch."""
    folder = tmp_path_factory.mktemp("best")
    return folder, *run(bert, folder, select="best")


def test_every_epoch_is_evaluated_and_the_best_is_kept(bert, whole, tmp_path):
    folder, trained, result = whole
    assert [float(epoch) for epoch in result.epochs] == [1, 2, 3, 4]
    best = best_epoch(result.epochs, "accuracy")
    assert result.after == result.epochs[best] == max(result.epochs.values())
    assert result.epochs[best] > result.epochs["4"], "a case that tells best from last"
    # What is kept is what was trained up to that epoch, under the same schedule.
    steps = 4 * int(best)
    kept = {}

    class Keep:
        def __getattr__(self, name):
            return lambda *_, **__: None

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == steps:
                parameters = model.named_parameters()
                kept.update({n: p.detach().clone() for n, p in parameters if p.requires_grad})

    last, other = run(bert, tmp_path, callbacks=[Keep()])
    assert other.epochs == result.epochs
    assert other.after == other.epochs["4"]
    assert all(torch.equal(trained[name], kept[name]) for name in kept)
    assert any(not torch.equal(trained[name], last[name]) for name in last)
    saved = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    saved = dict(load_adapter(saved, folder / "adapter").named_parameters())
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_a_run_that_died_keeps_the_same_epoch(bert, whole, tmp_path):
    """Its last checkpoint lies within an epoch that had been evaluated already."""
    _, trained, result = whole

    class Died(Exception):
        pass

    class Die:
        def __getattr__(self, name):
            return lambda *_, **__: None

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 13:
                raise Died

    with pytest.raises(Died):
        run(bert, tmp_path, callbacks=[Die()], select="best")
    for later in ("checkpoint-12", "checkpoint-9"):
        shutil.rmtree(tmp_path / later)
    assert len(json.loads((tmp_path / "epochs.json").read_text())) == 3
    again, other = run(bert, tmp_path, select="best")
    assert other.epochs == result.epochs
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_a_lower_loss_is_better_and_the_earlier_epoch_wins():
    values = {"1": 0.5, "2": 0.7, "3": 0.7, "10": 0.5}
    assert best_epoch(values, "accuracy") == "2"
    assert best_epoch(values, "loss") == "1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "best"}, "expected evaluate_every: epoch"),
        ({"select": "first"}, "select is 'first'; expected one of last, best"),
        ({"evaluate_every": "step"}, "evaluate_every is 'step'; expected one of epoch"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        resolve({"model": "m", "data": "d", "output_dir": "o", **settings})
    assert message in str(error.value)


def test_epochs_are_compared_by_one_metric(bert, whole):
    folder, _, result = whole
    with pytest.raises(ConfigError, match="evaluation is 'matthews', but output_dir"):
        run(bert, folder, select="best", evaluation="matthews")
    assert run(bert, folder, select="best")[1].epochs == result.epochs  # a finished run, again


def test_epochs_are_evaluated_on_something(bert, tmp_path):
    config = tiny_config(bert, tmp_path, task="classification", evaluate_every="epoch")
    with pytest.raises(ConfigError, match="expected eval_data"):
        finetune(config, reviews(8))
    assert not list(tmp_path.iterdir())
