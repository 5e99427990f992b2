"""The sums are those of the per-sample gradients, however they are split into micro-batches."""

import pytest
import torch

from lorasb_kernels.init import EstimationOptions, estimate_gradients, estimate_updates
from lorasb_kernels.init.estimation.losses import per_sample_loss, sample_count
from tests.init.models import (
    FAMILIES,
    Stack,
    batches_for,
    linear_names,
    llama,
    padded,
    samples,
    stack_batches,
    stack_loss,
)


def oracle(family: str, names: list[str], count: int = 5) -> dict[str, torch.Tensor]:
    """Sums of per-sample gradients by the model's own loss, one sample at a time, float64."""
    model = FAMILIES[family]().eval().double()
    for row in samples(count, classes=3 if family == "roberta" else None):
        model(**padded([row])).loss.backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_sum_is_that_of_the_models_own_loss_sample_by_sample(family):
    model = FAMILIES[family]()
    names = linear_names(model)
    reference = oracle(family, names)
    sums = dict(
        estimate_gradients(
            model, batches_for(family), names, EstimationOptions(strategy="resident")
        )
    )
    assert list(sums) == names
    for name in names:
        assert sums[name].dtype == torch.float32
        assert relative_error(sums[name], reference[name]) < 3e-6, name


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (5,), (4, 1)])
def test_every_sample_weighs_the_same_in_any_cut(sizes):
    model = llama()
    names = linear_names(model)
    reference = oracle("llama", names)
    for name, total in estimate_gradients(model, batches_for("llama", sizes), names):
        assert relative_error(total, reference[name]) < 3e-6, (name, sizes)


def test_signs_are_those_of_the_sums():
    model = llama()
    names = linear_names(model)
    batches = batches_for("llama")
    sums = dict(estimate_gradients(model, batches, names))
    for name, signs in estimate_updates(model, batches, names):
        assert torch.equal(signs.to_dense(), sums[name].sign()), name


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_padding_adds_nothing(strategy):
    model = llama()
    names = linear_names(model)
    rows = samples(3)
    near = dict(
        estimate_gradients(model, [padded(rows)], names, EstimationOptions(strategy=strategy))
    )
    far = dict(
        estimate_gradients(
            model, [padded(rows, extra=9)], names, EstimationOptions(strategy=strategy)
        )
    )
    for name in names:
        assert relative_error(far[name], near[name].double()) < 1e-5, name


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_vector_and_scalar_losses_weigh_samples_alike(strategy):
    model = Stack()
    names = linear_names(model)
    vector = dict(
        estimate_gradients(
            model,
            stack_batches((3, 2)),
            names,
            EstimationOptions(loss_fn=stack_loss, strategy=strategy),
        )
    )
    scalar = dict(
        estimate_gradients(
            model,
            stack_batches((1, 4)),
            names,
            EstimationOptions(
                loss_fn=lambda model, batch: stack_loss(model, batch).mean(), strategy=strategy
            ),
        )
    )
    for name in names:
        assert relative_error(scalar[name], vector[name].double()) < 1e-5, name


def test_custom_loss_changes_the_sum():
    model = llama()
    names = linear_names(model)[:2]
    batch = padded(samples(3))

    def first_sample_only(model, batch):
        return per_sample_loss(model, batch)[:1]

    alone = dict(estimate_gradients(model, [padded(samples(3)[:1])], names))
    picked = estimate_gradients(model, [batch], names, EstimationOptions(loss_fn=first_sample_only))
    for name, total in picked:
        assert relative_error(total, alone[name].double()) < 1e-5, name


def test_layer_called_twice_counts_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(input=self.linear(x))

    model = Twice()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model(x).square().sum(1).sum().backward()
    wanted = model.linear.weight.grad.clone()
    loss = lambda model, batch: model(batch).square().sum(1)  # noqa: E731
    ((_, total),) = estimate_gradients(model, [x], ["linear"], EstimationOptions(loss_fn=loss))
    torch.testing.assert_close(total, wanted)


def test_in_place_change_of_a_layers_output_is_no_obstacle():
    model = Stack()
    name = "blocks.1.up"
    batches = stack_batches()
    ((_, total),) = estimate_gradients(
        model, batches, [name], EstimationOptions(loss_fn=stack_loss)
    )
    model.eval()
    stack_loss(model, torch.cat(batches)).sum().backward()
    torch.testing.assert_close(total, model.get_submodule(name).weight.grad)


def test_autocast_of_the_caller_applies():
    model = llama()
    names = linear_names(model)
    reference = oracle("llama", names)
    with torch.autocast("cpu", torch.bfloat16):
        sums = dict(estimate_gradients(model, batches_for("llama"), names))
    errors = [relative_error(sums[name], reference[name]) for name in names]
    assert 1e-4 < max(errors) < 5e-2
    assert all(total.dtype == torch.float32 for total in sums.values())


def test_float16_gradients_do_not_underflow():
    """Gradients of 1e-9 are zero in float16 unless the loss is scaled."""
    model = Stack().half()
    model.after.weight.data.mul_(1e-4)
    batches = [batch.half() for batch in stack_batches()]
    names = linear_names(model)

    def small(model, batch):
        return model(batch).float().squeeze(1) * 5e-4

    sums = dict(estimate_gradients(model, batches, names, EstimationOptions(loss_fn=small)))
    exact = Stack().double().eval()
    exact.after.weight.data.mul_(1e-4)
    small_loss = exact(torch.cat(batches).double()).squeeze(1) * 5e-4
    small_loss.sum().backward()
    wanted = exact.blocks[0].down.weight.grad
    assert 0 < wanted.abs().max() < 6e-8
    assert relative_error(sums["blocks.0.down"], wanted) < 0.05


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4)}, 4),
        ({"text": "abc", "x": torch.zeros(3, 2)}, 3),
        ((torch.zeros(()), torch.zeros(6, 1)), 6),
        (torch.zeros(2, 5), 2),
    ],
)
def test_sample_count_is_the_first_dimension(batch, count):
    assert sample_count(batch) == count


def test_sample_count_of_no_tensor_is_an_error():
    with pytest.raises(ValueError, match="no tensor in it"):
        sample_count({"text": "abc"})
