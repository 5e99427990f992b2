"""Packed cores: the numbers of separate cores, in one parameter."""

import copy
import gc

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

from lorasb_kernels import LoRASBConfig, PackedCores, adapt, load_adapter, save_adapter
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

CONFIG = LoRASBConfig(4, ("q_proj", "up_proj"), init="orthogonal")


def model():
    return adapt(build("llama"), CONFIG, progress=False)


def cores(model):
    return [layer.lora_R for layer in adapted_layers(model).values()]


def train(model, parameters, optimizer, steps=3, clip=None, clear="optimizer", accumulate=1):
    norms = []
    for step in range(steps):
        for batch in batches("llama", accumulate, seed=step):
            model(**batch).loss.backward()
        if clip is not None:
            norms.append(clip_grad_norm_(parameters, clip))
        optimizer.step()
        if clear == "optimizer":
            optimizer.zero_grad()
        elif clear == "model":
            model.zero_grad()
        elif clear == "zeros":
            optimizer.zero_grad(set_to_none=False)
    return norms


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_the_numbers_are_those_of_separate_cores(optimizer, clear):
    separate, packed_model = model(), model()
    train(separate, cores(separate), OPTIMIZERS[optimizer](cores(separate)), accumulate=2)
    packed = PackedCores(packed_model)
    step = OPTIMIZERS[optimizer]([packed.parameter])
    train(packed_model, [packed.parameter], step, clear=clear, accumulate=2)
    for ours, theirs in zip(cores(packed_model), cores(separate), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_core_without_a_gradient_stays_where_it_is(clear):
    """In the second step the last layer takes no part; a plain AdamW passes over its cores."""
    separate, packed_model = model(), model()
    packed = PackedCores(packed_model)
    optimizers = {
        separate: OPTIMIZERS["adamw"](cores(separate)),
        packed_model: OPTIMIZERS["adamw"]([packed.parameter]),
    }
    for one, optimizer in optimizers.items():
        train(one, None, optimizer, steps=1, clear=clear)
        left_out = [core for core in cores(one) if core.shape[0]][-len(cores(one)) // 2 :]
        before = [core.detach().clone() for core in left_out]
        layers = one.model.layers
        one.model.layers = layers[: len(layers) // 2]
        one.config.num_hidden_layers = len(one.model.layers)
        train(one, None, optimizer, steps=1, clear=clear)
        one.model.layers, one.config.num_hidden_layers = layers, len(layers)
        for core, values in zip(left_out, before, strict=True):
            assert torch.equal(core, values)
    for ours, theirs in zip(cores(packed_model), cores(separate), strict=True):
        assert torch.equal(ours, theirs)


def test_the_hooks_on_optimizers_go_with_their_packed_cores():
    gc.collect()
    count = len(hooks)
    packed = PackedCores(model())
    assert len(hooks) == count + 1
    del packed
    gc.collect()
    assert len(hooks) == count


def test_clipping_is_one_norm_over_all():
    separate, packed_model = model(), model()
    expected = train(separate, cores(separate), OPTIMIZERS["adamw"](cores(separate)), clip=1e-3)
    packed = PackedCores(packed_model)
    got = train(
        packed_model, [packed.parameter], OPTIMIZERS["adamw"]([packed.parameter]), clip=1e-3
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(cores(packed_model), cores(separate))


def test_gradients_are_views_of_one_buffer():
    packed_model = model()
    packed = PackedCores(packed_model)
    packed_model(**batches("llama")[0]).loss.backward()
    assert packed.parameter.grad.shape == (sum(c.numel() for c in cores(packed_model)),)
    flat = torch.cat([core.grad.reshape(-1) for core in cores(packed_model)])
    assert torch.equal(flat, packed.parameter.grad)
    packed.parameter.grad.zero_()
    assert not any(core.grad.any() for core in cores(packed_model))


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_core_without_gradient_counts_as_zero(clear):
    packed_model = model()
    packed = PackedCores(packed_model)
    packed_model(**batches("llama")[0]).loss.backward()
    assert cores(packed_model)[-1].grad.any()
    if clear == "optimizer":
        packed.parameter.grad = None
    else:
        packed_model.zero_grad()
    hidden = packed_model(**batches("llama")[0], output_hidden_states=True).hidden_states
    hidden[1].square().sum().backward()  # the first of two blocks
    gradient = packed.parameter.grad
    half = len(gradient) // 2
    assert gradient[:half].any()
    assert not gradient[half:].any()


@pytest.mark.parametrize("direction", ["to separate", "to packed"])
def test_state_moves_between_packed_and_separate(direction):
    head = torch.nn.Parameter(torch.ones(3))
    reference, first, second = model(), model(), model()
    for candidate in (first, second):
        candidate.load_state_dict(reference.state_dict())
    expected = torch.optim.AdamW([*cores(reference), head], lr=1e-2)
    train(reference, None, expected, steps=3)
    if direction == "to separate":
        packed = PackedCores(first)
        optimizer = torch.optim.AdamW([packed.parameter, head], lr=1e-2)
        train(first, None, optimizer, steps=2)
        state = packed.separate_state(optimizer)
        other = torch.optim.AdamW([*cores(second), head], lr=1e-2)
        other.load_state_dict(state)
    else:
        separate = torch.optim.AdamW([*cores(first), head], lr=1e-2)
        train(first, None, separate, steps=2)
        packed = PackedCores(second)
        other = torch.optim.AdamW([packed.parameter, head], lr=1e-2)
        packed.load_separate_state(other, separate.state_dict())
    second.load_state_dict(first.state_dict())
    for step in (2,):
        second(**batches("llama", 1, seed=step)[0]).loss.backward()
        other.step()
        other.zero_grad()
    for ours, theirs in zip(cores(second), cores(reference), strict=True):
        assert torch.equal(ours, theirs)


def test_saving_loading_and_copying(tmp_path):
    packed_model = model()
    packed = PackedCores(packed_model)
    with torch.no_grad():
        packed.parameter.add_(0.1)
    save_adapter(packed_model, tmp_path)
    batch = batches("llama")[0]
    expected = packed_model(**batch).logits
    torch.testing.assert_close(load_adapter(build("llama"), tmp_path)(**batch).logits, expected)
    twin = copy.deepcopy(packed_model)
    with torch.no_grad():
        packed.parameter.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    load_adapter(packed_model, tmp_path)
    assert packed.parameter.any()
    torch.testing.assert_close(packed_model(**batch).logits, expected)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="holds no adapter"):
        PackedCores(build("llama"))
    frozen = model()
    cores(frozen)[0].requires_grad_(False)
    with pytest.raises(ValueError, match="lora_R is frozen"):
        PackedCores(frozen)
    moved = model()
    packed = PackedCores(moved)
    with pytest.raises(ValueError, match=r"does not hold packed\.parameter"):
        packed.separate_state(torch.optim.SGD(cores(moved), lr=1.0))
    first = cores(moved)[0]
    first.data = first.data.clone()
    with pytest.raises(RuntimeError, match="no longer a view of the packed cores"):
        moved(**batches("llama")[0]).loss.backward()
