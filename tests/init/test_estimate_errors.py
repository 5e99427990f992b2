"""Bad input raises an error that names it, and no partial result is returned."""

import re

import pytest
import torch
from torch import nn

from lorasb_kernels.init import EstimationOptions, estimate_updates
from tests.init.models import (
    Stack,
    batches_for,
    linear_names,
    llama,
    padded,
    samples,
    stack_batches,
    stack_loss,
)

STRATEGIES = ["resident", "layerwise", "grouped"]


def estimate(model=None, batches=None, targets=None, **options):
    """All updates of a `Stack`, with some argument replaced."""
    model = Stack() if model is None else model
    batches = stack_batches() if batches is None else batches
    targets = linear_names(model) if targets is None else targets
    return list(
        estimate_updates(
            model, batches, targets, EstimationOptions(**{"loss_fn": stack_loss} | options)
        )
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": 3}, TypeError, "model is a int; expected a torch.nn.Module"),
        ({"batches": []}, ValueError, "batches is empty; expected at least one batch"),
        ({"batches": {"x": 1}}, TypeError, "batches is a dict; expected an iterable of batches"),
        ({"targets": []}, ValueError, "targets is empty"),
        ({"targets": "before"}, TypeError, "targets is the string 'before'; expected a list"),
        ({"targets": ["befor"]}, ValueError, "targets names 'befor'; expected a name in model"),
        ({"targets": ["blocks.0.norm"]}, TypeError, "target 'blocks.0.norm' is a BatchNorm1d"),
        ({"strategy": "fast"}, ValueError, "strategy is 'fast'; expected one of auto, resident"),
        ({"memory_budget": 10}, ValueError, "memory_budget is 10; expected at least 512 bytes"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget is 1000000000.0; expected"),
        ({"loss_fn": 3}, TypeError, "loss_fn is a int; expected a function"),
    ],
)
def test_arguments_are_checked_before_anything_runs(change, kind, message):
    targets = ["before"] if "model" in change else linear_names(Stack())
    arguments = {"model": Stack(), "batches": stack_batches(), "targets": targets}
    options = {"loss_fn": lambda *_: pytest.fail("ran")}
    for name, value in change.items():
        (arguments if name in arguments else options)[name] = value
    with pytest.raises(kind, match=re.escape(message)):
        estimate_updates(**arguments, options=EstimationOptions(**options))


def test_no_batches_at_all():
    with pytest.raises(ValueError, match="batches is None; expected the samples"):
        estimate_updates(Stack(), None, ["before"], EstimationOptions(loss_fn=stack_loss))


def test_meta_weights():
    with pytest.raises(ValueError, match="target 'before' is on the meta device"):
        estimate_updates(
            Stack().to("meta"), stack_batches(), ["before"], EstimationOptions(loss_fn=stack_loss)
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda m, b: None, ValueError, "loss of batch 0 is None; expected a tensor"),
        (lambda m, b: 1.5, TypeError, "loss of batch 0 is a float; expected a floating-point"),
        (lambda m, b: m(b), ValueError, "loss of batch 0 has shape (3, 1); expected the per-s"),
        (lambda m, b: stack_loss(m, b).detach(), ValueError, "loss of batch 0 does not require g"),
        (
            lambda m, b: stack_loss(m, b) / (0.0 if len(b) == 2 else 1.0),
            FloatingPointError,
            "loss of batch 1 is inf; expected it finite",
        ),
    ],
)
def test_losses_that_are_none(strategy, loss, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        estimate(strategy=strategy, loss_fn=loss)


def test_missing_labels():
    model = llama()
    batch = padded(samples(2))
    del batch["labels"]
    with pytest.raises(ValueError, match=r"no labels, only \['attention_mask', 'input_ids'\]"):
        estimate(model, [batch], loss_fn=None)


def test_model_of_unknown_loss():
    with pytest.raises(TypeError, match="model is a Stack, whose per-sample loss is not known"):
        estimate(loss_fn=None)


class NotANumberGradient(torch.autograd.Function):
    """Identity whose gradient is NaN where the input is above a threshold."""

    @staticmethod
    def forward(ctx, x, non_finite):
        ctx.non_finite = non_finite
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("nan") if ctx.non_finite else 1.0), None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nonfinite_gradient_names_layer_and_batch(strategy):
    model = Stack()
    down = model.blocks[1].down
    original = down.forward
    batches = stack_batches((3, 2, 4))
    down.forward = lambda x: NotANumberGradient.apply(original(x), len(x) == 2)
    message = "the gradient of layer blocks.(0|1).(up|down) is not finite in batch 1"
    with pytest.raises(FloatingPointError, match=message):
        estimate(model, batches, ["blocks.0.up", "blocks.1.up"], strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_everywhere_says_which_layers_and_why(strategy):
    model = llama()
    batches = batches_for("llama")
    for batch in batches:
        batch["labels"].fill_(-100)
    names = linear_names(model)[:2]
    with pytest.raises(ValueError, match="gradient of every target layer is zero") as error:
        estimate(model, batches, names, loss_fn=None, strategy=strategy)
    reason = "2 with gradients that are exactly zero (are all labels ignored?), such as"
    assert f"{reason} {names[0]}" in str(error.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_somewhere_is_a_warning(strategy):
    model = Stack()
    model.unused = nn.Linear(8, 8)
    model.aside = nn.Linear(8, 8)

    def loss(model, batch):
        model.aside(batch)
        return stack_loss(model, batch)

    with pytest.warns(UserWarning, match="gradient of 2 of 10 target layers is zero") as caught:
        found = dict(estimate(model, strategy=strategy, loss_fn=loss))
    message = str(caught[0].message)
    assert "1 not called in the forward pass, such as unused" in message
    assert "1 not reached by the backward pass (the loss does not depend on it), such" in message
    assert found["unused"].zeros() == 64


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("strategy", ["resident", "grouped"])
def test_reentrant_checkpoint_without_gradients_is_an_error(strategy):
    def loss(model, batch):
        x = model.before(batch)
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        return model.after(x).squeeze(1)

    names = [name for name in linear_names(Stack()) if name != "before"]
    with pytest.raises(ValueError, match=r"layer blocks.0.up is run with gradients off"):
        estimate(targets=names, strategy=strategy, loss_fn=loss)


def test_out_of_memory_in_every_strategy(monkeypatch):
    def broken(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        pytest.warns(UserWarning, match="gave up: out of memory"),
        pytest.raises(MemoryError, match="'grouped' gave up: out of memory"),
    ):
        estimate(strategy="resident", loss_fn=broken)
