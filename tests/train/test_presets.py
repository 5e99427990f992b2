"""The papers' settings: their layers, the trained parameters of their tables, one per task."""

import pytest
import torch

from bench.models import random_model
from lorasb_kernels.targets import find_targets
from lorasb_kernels.train.config import LLAMA_TARGETS
from lorasb_kernels.train.settings_file import load_preset, preset_names, resolve

NEEDED = {"model": "m", "data": "d.jsonl", "output_dir": "o"}
META = torch.device("meta")


def preset(name: str):
    return resolve({**NEEDED, "preset": name})


# preset, r, learning rate, schedule, batch, accumulation, length, epochs, dropout, warm-up
PAPER = [
    ("arithmetic", 32, 1e-4, "cosine", 1, 32, 512, 1, 0.0, 0.02),
    ("commonsense", 32, 2e-3, "linear", 6, 24, 256, 2, 0.05, 0.02),
    ("glue", 8, 1e-3, "linear", 128, 1, 256, 30, 0.0, 0.06),
]


@pytest.mark.parametrize("row", PAPER, ids=[row[0] for row in PAPER])
def test_presets_carry_the_hyperparameters_of_lora_sb(row):
    config = preset(row[0])
    names = "r learning_rate schedule batch_size accumulation max_length epochs dropout"
    found = tuple(getattr(config, name) for name in [*names.split(), "warmup_ratio"])
    assert found == row[1:]
    assert config.method == "lora-sb"
    assert (config.init_share, config.init_minimum) == (1e-3, 1)


@pytest.mark.parametrize(
    ("task", "epochs", "metric"),
    [
        ("cola", 30, "matthews"),
        ("rte", 30, "accuracy"),
        ("mrpc", 30, "accuracy"),
        ("sst2", 15, "accuracy"),
        ("qnli", 15, "accuracy"),
        ("stsb", 30, "pearson"),
    ],
)
def test_every_task_of_glue_has_its_preset(task, epochs, metric):
    config = preset(f"glue-{task}")
    assert (config.epochs, config.evaluation, config.max_grad_norm) == (epochs, metric, 0)
    assert config.target_modules == preset("glue").target_modules


def test_presets_of_large_models_keep_frozen_weights_in_16_bits():
    for name in ("arithmetic", "commonsense"):
        assert preset(name).dtype == "bfloat16"


@pytest.mark.parametrize("name", preset_names())
def test_presets_hold_settings_that_can_be_used(name):
    assert "preset" not in load_preset(name)
    preset(name)


def trained(layers: dict, r: int) -> tuple[int, int, int]:
    """Trained numbers of a core per layer, of LoRA and of DoRA (arXiv:2402.09353)."""
    lora = sum(r * (layer.in_features + layer.out_features) for layer in layers.values())
    magnitudes = sum(layer.out_features for layer in layers.values())
    return len(layers) * r * r, lora, lora + magnitudes


def test_glue_trains_the_parameters_of_the_tables():
    """LoRA 2 162 688 and DoRA 2 260 992 at r = 8 are those of the public code's targets; the
    layers that the text names give another number."""
    code = ("query", "value", "attention.output.dense", "output.dense")
    assert preset("glue").target_modules == preset("loraxs-glue").target_modules == code
    model = random_model("roberta-large", META, torch.bfloat16)
    layers = find_targets(model, preset("glue").target_modules)
    assert len(layers) == 96
    assert [trained(layers, r)[0] for r in (8, 16, 24)] == [6_144, 24_576, 55_296]
    assert trained(layers, 8)[1:] == (2_162_688, 2_260_992)
    text = find_targets(model, ("query", "key", "value", "attention.output.dense"))
    assert trained(text, 8)[1] == 1_572_864


@pytest.mark.parametrize(
    ("key", "cores", "lora"),
    [
        ("mistral-7b", (229_376, 917_504, 2_064_384), 83_886_080),
        ("gemma-2-9b", (301_056, 1_204_224, 2_709_504), 108_036_096),
        ("llama-3.2-3b", (200_704, 802_816, 1_806_336), 48_627_712),
    ],
)
def test_large_models_train_the_parameters_of_the_tables(key, cores, lora):
    """LoRA-SB, arithmetic and commonsense: cores at r = 32, 64 and 96, LoRA at r = 32."""
    for name in ("arithmetic", "commonsense"):
        assert preset(name).target_modules == LLAMA_TARGETS
    layers = find_targets(random_model(key, META, torch.bfloat16), LLAMA_TARGETS)
    assert tuple(trained(layers, r)[0] for r in (32, 64, 96)) == cores
    assert trained(layers, 32)[1] == lora
