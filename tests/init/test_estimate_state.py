"""The model, its flags and the random number generators are unchanged afterwards."""

import copy
import random

import numpy as np
import pytest
import torch

from lorasb_kernels.init import EstimationOptions, estimate_updates
from tests.init.models import Stack, batches_for, linear_names, llama, stack_batches, stack_loss

STRATEGIES = ["resident", "layerwise", "grouped"]


def state(model) -> dict:
    """Everything that must not change, by value, except tensors of parameters and buffers."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "grad": [id(p.grad) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forward": ["forward" in module.__dict__ for module in model.modules()],
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
        "cpu": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def tensors(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})


class Noisy(Stack):
    """Draws numbers, counts its calls in a buffer and replaces another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        self.calls += 1
        self.scale = torch.tensor(2.0)
        return super().forward(x)


def mixed(model):
    """Gives `model` a mixture of modes, flags and gradients."""
    model.blocks[1].eval()
    model.before.weight.requires_grad_(False)
    model.blocks[0].up.weight.grad = torch.ones_like(model.blocks[0].up.weight)
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_is_restored_at_every_yield_and_at_the_end(strategy):
    model = mixed(Noisy())
    before, values = state(model), tensors(model)
    updates = estimate_updates(
        model,
        stack_batches(),
        linear_names(model),
        EstimationOptions(
            strategy=strategy,
            memory_budget=1024 if strategy == "grouped" else None,
            loss_fn=stack_loss,
        ),
    )
    assert state(model) == before
    for _ in updates:
        assert state(model) == before
    assert state(model) == before
    for name, value in tensors(model).items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_restored_when_closed_early(strategy):
    model = mixed(Noisy())
    before = state(model)
    updates = estimate_updates(
        model,
        stack_batches(),
        linear_names(model),
        EstimationOptions(strategy=strategy, loss_fn=stack_loss),
    )
    next(updates)
    updates.close()
    assert state(model) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_restored_after_an_exception(strategy, moment):
    model = mixed(Noisy())
    before = state(model)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("planted")

    def loss(model, batch):
        losses = stack_loss(model, batch)
        if moment == "forward":
            raise ArithmeticError("planted")
        return Fails.apply(losses)

    with pytest.raises(ArithmeticError, match="planted"):
        list(
            estimate_updates(
                model,
                stack_batches(),
                linear_names(model),
                EstimationOptions(strategy=strategy, loss_fn=loss),
            )
        )
    assert state(model) == before


def test_transformers_configuration_is_restored_and_no_cache_is_built():
    model = llama()
    model.model.layers[1].eval()
    before = state(model)
    seen = []
    handle = model.model.register_forward_hook(lambda m, a, output: seen.append(output))
    list(estimate_updates(model, batches_for("llama"), linear_names(model)))
    handle.remove()
    assert before["use_cache"]
    assert state(model) == before
    assert seen
    assert all(output.past_key_values is None for output in seen)


def test_no_parameter_gets_a_gradient():
    model = llama()
    for strategy in STRATEGIES:
        list(
            estimate_updates(
                model,
                batches_for("llama"),
                linear_names(model),
                EstimationOptions(strategy=strategy),
            )
        )
        assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_and_batch_statistics_are_off_and_training_mode_kept():
    model, plain = Stack(), Stack().eval()
    names = linear_names(model)
    found = dict(
        estimate_updates(model, stack_batches(), names, EstimationOptions(loss_fn=stack_loss))
    )
    wanted = dict(
        estimate_updates(plain, stack_batches(), names, EstimationOptions(loss_fn=stack_loss))
    )
    assert found == wanted
    assert model.blocks[0].dropout.training


def test_works_under_no_grad_of_the_caller():
    model = Stack()
    names = linear_names(model)
    wanted = dict(
        estimate_updates(model, stack_batches(), names, EstimationOptions(loss_fn=stack_loss))
    )
    with torch.no_grad():
        found = dict(
            estimate_updates(model, stack_batches(), names, EstimationOptions(loss_fn=stack_loss))
        )
        assert not torch.is_grad_enabled()
    assert found == wanted


def test_shuffled_loader_leaves_the_global_generator_alone():
    model = Stack()
    loader = torch.utils.data.DataLoader(torch.randn(4, 8), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    list(
        estimate_updates(model, loader, linear_names(model), EstimationOptions(loss_fn=stack_loss))
    )
    assert torch.equal(torch.get_rng_state(), before)
