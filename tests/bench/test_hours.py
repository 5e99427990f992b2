"""The predicted hours of docs/reproduce.md."""

import dataclasses
import re

import pytest

from bench import hours
from lorasb_kernels.hardware.gpus import find_gpu
from lorasb_kernels.profiling.costs import frozen
from lorasb_kernels.train.settings_file import resolve

A6000 = find_gpu("a6000")
PAGE = hours.PAGE.read_text(encoding="utf-8")


@pytest.fixture
def at_the_root(monkeypatch):
    """Where the commands of the page find their files."""
    monkeypatch.chdir(hours.PAGE.parents[1])


@pytest.mark.filterwarnings("ignore:optimal_gradient")
def test_the_page_has_what_the_model_predicts(at_the_root):
    assert hours.with_table(PAGE, A6000) == PAGE, "`python -m bench.hours --write` writes it"
    assert "PREDICTION, not measured, for an NVIDIA RTX A6000:" in PAGE


def test_every_training_command_of_the_page_has_its_hours():
    written = set(re.findall(r"^\| (out/\S+)", PAGE, re.MULTILINE))
    folders = set(re.findall(r"(?:train|compare) (?:.*\\\n)*.*--output-dir (\S+)", PAGE))
    assert len(folders) > 10
    assert written - folders == {
        *("out/sb-rte", "out/sb-mrpc", "out/sb-sst2", "out/sb-qnli"),
        *("out/xs-sst2", "out/xs-qnli", "out/xs-mrpc", "out/xs-stsb"),
    }
    assert folders <= written


def config(**changes):
    settings = {"model": "mistralai/Mistral-7B-v0.1", "data": "MetaMathQA-395K.json"}
    return resolve(settings | {"preset": "arithmetic", "output_dir": "out"} | changes)


def test_hours_follow_from_rows_epochs_lengths_and_the_model():
    one = hours.training_hours(A6000, config())
    assert hours.training_hours(A6000, config(epochs=3)) == pytest.approx(3 * one)
    assert hours.training_hours(A6000, config(data_limit=5000)) == pytest.approx(one / 10)
    assert hours.training_hours(A6000, config(method="full")) == pytest.approx(1.5 * one)
    assert hours.training_hours(A6000, config(dtype="float32")) == pytest.approx(4 * one)
    # Larger batches amortize the launches and the weights' bytes.
    assert hours.training_hours(A6000, config(batch_size=16)) < one
    # No less than the frozen products at the datasheet's rate, and not ten times as much.
    model, tokens = hours.MODELS["mistralai/Mistral-7B-v0.1"], 50_000 * 300
    flops = sum(
        cost.flops
        for layer in model.layers
        for cost in frozen(tokens, layer.n, layer.m, 1, 2).of("both")
    )
    least = model.blocks * flops / A6000.rate("bfloat16") / 3600
    assert least < one < 4 * least


def test_answers_are_written_token_by_token():
    settings = config()
    loss = hours.judging_hours(A6000, settings, "loss", "data/gsm8k_test.jsonl")
    short, long = (
        hours.judging_hours(
            A6000, dataclasses.replace(settings, max_new_tokens=n), "numeric", "gsm8k_test.jsonl"
        )
        for n in (64, 128)
    )
    assert long - short == pytest.approx(short - loss)
    # Every token reads the weights of Mistral's layers, 14 GB, for a batch of 32 rows.
    batches = -(-1319 // 32)
    assert (short - loss) * 3600 > 64 * batches * 13.9e9 / 768e9
