"""Settings: the papers' presets, layers of settings, errors that name what is wrong."""

import json

import pytest
import torch

from lorasb_kernels.cli.config import NEEDED as EXAMPLE
from lorasb_kernels.cli.config import settings_text
from lorasb_kernels.train.config import TrainConfig, fields
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.settings_file import load_file, load_preset, preset_names, resolve

NEEDED = {"model": "m", "data": "d.jsonl", "output_dir": "o"}


def test_later_layers_win_and_the_preset_lies_below():
    config = resolve({"preset": "arithmetic", "r": 64}, NEEDED, {"r": 96})
    assert config.r == 96
    assert config.learning_rate == 1e-4


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_are_read_with_plain_exponents(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    text = '{"learning_rate": 1e-4, "r": 8}' if suffix == "json" else "learning_rate: 1e-4\nr: 8"
    path.write_text(text)
    assert load_file(path) == {"learning_rate": 1e-4, "r": 8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "8"}, "r is '8'; expected int"),
        ({"r": True}, "r is True; expected int"),
        ({"r": 0}, "r is 0; expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a positive number"),
        ({"method": "lorasb"}, "method is 'lorasb'; expected one of lora-sb"),
        ({"task": "chat"}, "task is 'chat'; expected one of causal-lm"),
        ({"evaluation": "accuracy"}, "evaluation is 'accuracy'; expected one of loss"),
        ({"task": "classification", "batching": "packed"}, "batching is 'packed'"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 ≤ dropout < 1"),
        ({"init_share": 0}, "init_share is 0"),
        ({"init_strategy": "fast"}, "init_strategy is 'fast'; expected one of auto, resident"),
        ({"init_memory_budget": 0}, "init_memory_budget is 0; expected a positive number"),
        ({"target_modules": 3}, "target_modules is 3; expected str or tuple"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"learning_rte": 1}, "unknown learning_rte (learning_rate?); expected some of accumul"),
        ({"lora_dropout": 0.1}, "unknown lora_dropout (dropout?)"),
        ({"preset": "math"}, "preset is 'math'; expected one of arithmetic"),
        ({"data_format": "tsv"}, "data_format is 'tsv'; expected one of instruction"),
        ({"template": "chat"}, "template is 'chat'; expected one of alpaca"),
        ({"template": "alpaca", "system_prompt": "x"}, "system_prompt is given with template"),
        ({"max_cut_share": 1.5}, "max_cut_share is 1.5"),
        ({"stop": [""]}, "stop holds an empty text"),
    ],
)
def test_unusable_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        resolve({**NEEDED, **settings})
    assert message in str(error.value)


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match="missing model, output_dir"):
        resolve({"data": "d"})


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "rr: 8"])
def test_unusable_files_are_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_file(path)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_file(tmp_path / "none.yaml")


def test_settings_survive_json():
    config = TrainConfig(**NEEDED, target_modules=("q_proj", "v_proj"))
    assert resolve(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_a_written_settings_file_is_the_preset(tmp_path, preset):
    given = load_preset(preset) if preset else {}
    path = tmp_path / "run.yaml"
    path.write_text(settings_text(given))
    assert load_file(path) == EXAMPLE | given


def test_what_a_written_settings_file_leaves_out_is_the_default(tmp_path):
    path = tmp_path / "run.yaml"
    lines = settings_text({}).splitlines()
    all_set = [
        line.removeprefix("# ") for line in lines if line.split(":")[0].lstrip("# ") in fields()
    ]
    path.write_text("\n".join(all_set))
    assert resolve(load_file(path)) == resolve(EXAMPLE)
    assert len(all_set) == len(fields())


def test_every_setting_is_described():
    for name, field in fields().items():
        description = field.metadata["description"]
        assert len(description.split()) >= 2, name
        assert not description.endswith("."), name


def test_the_dtype_is_one_the_device_has():
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert TrainConfig(**NEEDED).dtype == ("bfloat16" if bfloat16 else "float32")
