"""Optimizer and RNG states are restored from a file without pickle, bit for bit."""

import random

import pytest
import torch

from lorasb_kernels.train.checkpoint import load_state, save_state


def test_nested_values_survive(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "moment": torch.randn(4, 3)}, 1: {}},
        "groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}],
        "name": "adamw",
        "flag": True,
        "random": random.getstate(),
        "bytes": torch.get_rng_state(),
    }
    save_state(tmp_path / "x.safetensors", state)
    loaded = load_state(tmp_path / "x.safetensors")
    for name in ("groups", "name", "flag", "random"):
        assert loaded[name] == state[name]
    assert isinstance(loaded["groups"][0]["betas"], tuple)
    assert list(loaded["state"]) == [0, 1]
    assert torch.equal(loaded["state"][0]["moment"], state["state"][0]["moment"])
    assert torch.equal(loaded["bytes"], state["bytes"])


def test_other_values_are_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot save a set"):
        save_state(tmp_path / "x.safetensors", {"a": {1}})


def test_an_optimizer_continues_exactly(tmp_path):
    def steps(parameter, optimizer, count):
        for i in range(count):
            parameter.grad = torch.sin(parameter.detach() + i)
            optimizer.step()

    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5))
    adam = torch.optim.AdamW([a], lr=0.1)
    steps(a, adam, 3)
    save_state(tmp_path / "x.safetensors", adam.state_dict())
    b = torch.nn.Parameter(a.detach().clone())
    other = torch.optim.AdamW([b], lr=0.7)
    other.load_state_dict(load_state(tmp_path / "x.safetensors"))
    steps(a, adam, 3)
    steps(b, other, 3)
    assert torch.equal(a, b)
