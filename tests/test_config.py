"""`LoRASBConfig`: validated when built, JSON round trip."""

import json
import warnings

import pytest

from lorasb_kernels import LoRASBConfig


def test_json_round_trip():
    config = LoRASBConfig(
        24, ["q_proj", "v_proj"], "lora-xs", lora_alpha=48, modules_to_save=["classifier"]
    )
    assert LoRASBConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.target_modules == ("q_proj", "v_proj")


def test_alpha_sets_the_scaling():
    assert LoRASBConfig(16, lora_alpha=32).s == 2.0
    assert LoRASBConfig(16, scaling=0.5).s == 0.5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "r is 0; expected 1 <= r <= 512"),
        ({"r": 513}, ValueError, "r is 513"),
        ({"r": 8.0}, TypeError, "r is 8.0; expected int"),
        ({"r": True}, TypeError, "r is True; expected int"),
        ({"target_modules": ()}, ValueError, "target_modules is empty"),
        ({"target_modules": 3}, TypeError, "target_modules is 3; expected str or tuple"),
        ({"target_modules": (1,)}, TypeError, "expected strings in it"),
        ({"init": "lora-zz"}, ValueError, "init is 'lora-zz'; expected one of 'lora-sb'"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; expected one of 'auto'"),
        ({"scaling": 0}, ValueError, "scaling is 0; expected finite and not 0"),
        ({"scaling": float("nan")}, ValueError, "scaling is nan"),
        ({"lora_alpha": 16, "scaling": 2.0}, ValueError, "expected one of them"),
        ({"dropout": 1}, ValueError, "dropout is 1; expected 0 <= dropout < 1"),
        ({"core_std": -1}, ValueError, "core_std is -1"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"optimal_gradient": 1}, TypeError, "optimal_gradient is 1; expected bool"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        LoRASBConfig(**{"r": 8, **fields})


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['rank'\]"):
        LoRASBConfig.from_dict({"r": 8, "rank": 8})
    with pytest.raises(ValueError, match="'r' is missing"):
        LoRASBConfig.from_dict({})
    with pytest.raises(TypeError, match="fields is a list"):
        LoRASBConfig.from_dict([8])


def test_a_scaling_that_lora_sb_is_not_trained_with_is_named():
    with pytest.warns(UserWarning, match="lora_alpha is 16, so the scaling of lora-sb is 2; its"):
        LoRASBConfig(r=8, lora_alpha=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRASBConfig(r=8, lora_alpha=8)
        LoRASBConfig(r=8, lora_alpha=16, init="lora-xs")


def test_the_dropout_of_peft_is_understood():
    config = LoRASBConfig(r=8, lora_dropout=0.25)
    assert config == LoRASBConfig(r=8, dropout=0.25)
    assert LoRASBConfig.from_dict(config.to_dict()) == config
