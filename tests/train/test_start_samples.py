"""How many samples the first update is estimated from."""

import pytest
import torch

from lorasb_kernels.init.estimation import noise_scale
from lorasb_kernels.init.estimation.noise_scale import NoiseScale
from lorasb_kernels.targets import find_targets
from lorasb_kernels.train import start_samples
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.run import load_model
from lorasb_kernels.train.start_samples import (
    AGREEMENT,
    PILOT,
    fixed_count,
    largest_count,
    measured_count,
    start_batches,
)
from tests.train.conftest import sums, tiny_config

AUTO = {"init_share": None, "init_minimum": None, "max_steps": None}


def test_the_rule_follows_from_what_is_given(llama, tmp_path):
    assert tiny_config(llama, tmp_path, **AUTO).init_samples == "auto"
    assert tiny_config(llama, tmp_path, **AUTO | {"init_share": 0.1}).init_samples == "share"
    assert tiny_config(llama, tmp_path, init_minimum=8).init_samples == "share"
    both = tiny_config(llama, tmp_path, init_minimum=8, init_samples="auto")
    assert (both.init_samples, both.init_minimum) == ("auto", 8)


@pytest.mark.parametrize(
    ("share", "minimum", "expected"), [(0.001, 8, 8), (0.5, 8, 48), (0.001, 500, 96)]
)
def test_a_share_with_a_minimum(llama, tmp_path, tokenizer, share, minimum, expected):
    config = tiny_config(llama, tmp_path, init_share=share, init_minimum=minimum)
    samples = Encoder(tokenizer, 32).examples(sums(96))
    count = fixed_count(config, 96)
    batches = start_batches(config, samples, 0, torch.device("cpu"), count)
    assert sum(len(batch["input_ids"]) for batch in batches) == count == expected
    assert max(len(batch["input_ids"]) for batch in batches) <= config.batch_size
    again = start_batches(config, samples, 0, torch.device("cpu"), count)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 3.0}, 600),
        ({"epochs": 0.1}, 32),
        ({"epochs": 50.0}, 2000),
        ({"max_steps": 100, "accumulation": 2}, 160),
    ],
)
def test_the_limit_is_a_tenth_of_what_training_sees(llama, tmp_path, settings, expected):
    config = tiny_config(llama, tmp_path, **AUTO | settings)
    assert largest_count(config, 2000) == expected


@pytest.fixture
def measured(llama, tmp_path, tokenizer, monkeypatch):
    """The count and the finding for samples whose gradients have the noise scale given."""

    def count(scale):
        config = tiny_config(llama, tmp_path, **AUTO | {"epochs": 3.0})
        samples = Encoder(tokenizer, 32).examples(sums(400))
        model, _ = load_model(config, ())
        if scale is not None:
            found = NoiseScale({"layer": scale})
            monkeypatch.setattr(start_samples, "noise_scale", lambda *arguments: found)
        return measured_count(model, config, samples, 0, find_targets(model, "all-linear", ()))

    return count


def test_as_many_samples_as_the_noise_asks_for(measured):
    count, finding = measured(15.0)
    assert count == 64
    assert NoiseScale({"layer": 15.0}).agreement(count) >= AGREEMENT
    assert "update estimated from 64 of 400 samples: cosine to the exact gradient abo" in finding
    assert measured(1.0)[0] == 32


def test_no_more_than_the_limit_and_what_more_would_give_is_said(measured):
    count, finding = measured(120.0)
    assert count == 120
    assert "120 of 400 samples, the limit: cosine to the exact gradient about 0.71" in finding
    assert "0.9 would take 512" in finding
    count, finding = measured(float("inf"))
    assert count == 120
    assert "show no common direction" in finding


def test_the_noise_is_measured_on_the_model(measured, monkeypatch):
    batches = []
    original = noise_scale.noise_scale

    def watched(model, drawn, sizes, targets):
        batches.extend(sizes)
        return original(model, drawn, sizes, targets)

    monkeypatch.setattr(start_samples, "noise_scale", watched)
    count, finding = measured(None)
    assert sum(batches) == PILOT
    assert 32 <= count <= 120
    assert "gradient noise scale" in finding or "no common direction" in finding
