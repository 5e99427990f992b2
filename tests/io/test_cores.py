"""`sync_cores` and `load_cores`: a step of the trainer, in the model that generates."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, load_cores, sync_cores
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build


@pytest.fixture
def policy():
    return adapt(build("llama").eval(), LoRASBConfig(r=4, init="lora-xs"), progress=False)


def step(model, seed):
    """Other cores, as after a step."""
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.normal_(std=0.1)


def logits(model):
    return model(**batches("llama")[0]).logits


def test_the_generator_follows(policy):
    generator = copy.deepcopy(policy)
    pointers = [layer.lora_R.data_ptr() for layer in adapted_layers(generator).values()]
    for seed in range(2):
        step(policy, seed)
        cores = sync_cores(policy)
        assert sum(core.numel() for core in cores.values()) == 4 * 4 * len(adapted_layers(policy))
        load_cores(generator, cores)
        assert torch.equal(logits(generator), logits(policy))
    assert pointers == [layer.lora_R.data_ptr() for layer in adapted_layers(generator).values()]


def test_they_are_copies(policy):
    cores = sync_cores(policy)
    before = {name: core.clone() for name, core in cores.items()}
    step(policy, 0)
    assert all(torch.equal(cores[name], before[name]) for name in cores)


def test_a_merged_generator_is_merged_anew_without_drift(policy):
    generator = copy.deepcopy(policy)
    for layer in adapted_layers(generator).values():
        layer.merge(keep_original=True)
    for seed in range(20):
        step(policy, seed)
        load_cores(generator, sync_cores(policy))
    once = copy.deepcopy(policy)
    for layer in adapted_layers(once).values():
        layer.merge()
    assert torch.equal(logits(generator), logits(once))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cores, name: {}, "lacks 14 of 14"),
        (lambda cores, name: cores | {"x.lora_R": cores[name]}, "1 unknown ones, such as .*x.lora"),
        (lambda cores, name: cores | {name: torch.zeros(5, 5)}, r"shape \[5, 5\]; expected \[4, 4"),
        (lambda cores, name: cores | {name: torch.full((4, 4), torch.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_changes_nothing(policy, change, message):
    step(policy, 0)
    before = sync_cores(policy)
    name = list(before)[-1]
    others = {core: torch.ones(4, 4) for core in before}
    with pytest.raises(ValueError, match=message):
        load_cores(policy, change(others, name))
    assert all(torch.equal(core, before[name]) for name, core in sync_cores(policy).items())


def test_refused(policy):
    cores = sync_cores(policy)
    next(iter(adapted_layers(policy).values())).merge()
    with pytest.raises(ValueError, match="original weight was not kept"):
        load_cores(policy, cores)
    with pytest.raises(ValueError, match="no adapter"):
        sync_cores(build("llama"))
    lora = adapt(build("llama"), LoRASBConfig(r=4, init="lora"), progress=False)
    with pytest.raises(ValueError, match="init is 'lora', which trains A and B"):
        sync_cores(lora)
