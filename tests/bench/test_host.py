"""`bench.host`: its contenders and passes, on a tiny model; no time is judged."""

import copy
import json

import pytest
import torch
from torch import nn

from bench import host, models


@pytest.fixture
def tiny(monkeypatch):
    def model(key, device, dtype):
        assert key == "smollm2-135m"
        return models.random_model("tiny", device, dtype)

    monkeypatch.setattr(host, "random_model", model)


def test_smollm2_has_its_number_of_parameters():
    with torch.device("meta"):
        model = models.random_model("smollm2-135m", torch.device("meta"), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_every_contender_in_every_pass():
    rows = host.measure_layer(rounds=2, burst=1)
    assert {(row["contender"], row["pass"]) for row in rows} == {
        (contender, name) for contender in host.LAYER for name in host.passes()
    }
    assert all(len(row["samples"]) == 2 and row["median"] > 0 for row in rows)


def test_contenders_compute_one_function():
    x = torch.ones(3, host.FEATURES)
    layers = host.tiny_layers()
    frozen = layers.pop("nn.Linear")(x)
    cores = [layers[name](x) for name in ("published", "addmm", "LoRASBLinear")]
    factors = [layers[name](x) for name in ("peft LoRA", "LoRALinear")]
    for same in (cores, factors):
        assert not torch.allclose(same[0], frozen)
        for other in same[1:]:
            torch.testing.assert_close(other, same[0])


def test_steps_train_what_they_name():
    before = models.random_model("tiny", torch.device("cpu"), torch.float32)
    trained = {}
    for name, change in host.TRAINED.items():
        model = change(copy.deepcopy(before), 4)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = [m for m in before.modules() if isinstance(m, nn.Linear)]
    assert trained["frozen"] == 0
    assert trained["full fine-tuning"] == sum(p.numel() for p in before.parameters())
    assert trained["published"] == trained["LoRA-SB, this library"] == 16 * (len(linear) - 1)
    assert trained["peft LoRA"] == trained["LoRA, this library"]


def test_the_command_writes_parts_one_after_another(tiny, tmp_path, monkeypatch, capsys):
    options = ["--output-dir", str(tmp_path), "--rounds", "1", "--burst", "1", "--step-rounds", "1"]
    for part in ("layer", "1 × 16"):
        monkeypatch.setattr("sys.argv", ["host", *options, "--part", part])
        threads = torch.get_num_threads()
        host.main()
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "host.json").read_text())
    assert set(record) == {"layer", "1 × 16", "environment"}
    shown = capsys.readouterr().out
    for words in ("LoRASBLinear", "forward + backward", "full fine-tuning", "1 × 16"):
        assert words in shown
