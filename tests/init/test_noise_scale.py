"""The gradient noise scale, against its definition and against what it predicts."""

import math

import pytest
import torch
from torch import nn

from lorasb_kernels.init import EstimationOptions
from lorasb_kernels.init.estimation.noise_scale import ROWS, NoiseScale, noise_scale
from tests.init.models import batches_for, linear_names, llama, padded, samples

WIDTH = 4


def drawn_gradients(count: int, rows: int, noise: float, seed: int = 0):
    """dy = μ + ε of `count` samples; with the input 1, 0, 0, 0 it is the gradient of a weight."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, generator=generator, dtype=torch.float64)
    mean /= mean.norm()
    errors = torch.randn(count, rows, generator=generator, dtype=torch.float64)
    return mean, mean + errors * noise / math.sqrt(rows)


def measured(gradients: torch.Tensor, size: int) -> float:
    layer = nn.Linear(WIDTH, gradients.shape[1], bias=False).double()
    x = torch.eye(WIDTH, dtype=torch.float64)[0]
    options = EstimationOptions(
        loss_fn=lambda model, batch: (model[0](x.expand(len(batch), -1)) * batch).sum(-1)
    )
    batches = gradients.split(size)
    found = noise_scale(nn.Sequential(layer), batches, list(map(len, batches)), ["0"], options)
    return found.by_layer["0"]


@pytest.mark.parametrize(("noise", "size"), [(0.5, 1), (2.0, 1), (2.0, 5), (6.0, 4)])
def test_it_is_the_variance_over_the_square_of_the_mean(noise, size):
    """Within three standard errors, which the draws themselves show."""
    found = [measured(drawn_gradients(400, ROWS, noise, seed)[1], size) for seed in range(12)]
    spread = torch.tensor(found, dtype=torch.float64)
    error = spread.std() / math.sqrt(len(found))
    assert abs(spread.mean() - noise**2) < 3 * error
    assert error < 0.1 * noise**2


def test_equal_gradients_have_no_noise_and_opposite_ones_no_mean():
    mean, _ = drawn_gradients(1, ROWS, 0.0)
    assert measured(mean.expand(8, -1), 2) == pytest.approx(0, abs=1e-12)
    alternating = mean * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)[:, None]
    assert measured(alternating, 1) == math.inf


def test_the_agreement_is_the_cosine_that_sums_reach():
    noise, count = 3.0, 16
    cosines = []
    for seed in range(200):
        mean, gradients = drawn_gradients(count, 512, noise, seed)
        cosines.append(torch.cosine_similarity(gradients.sum(0), mean, dim=0).item())
    scale = NoiseScale({"a": noise**2})
    assert scale.agreement(count) == pytest.approx(sum(cosines) / len(cosines), rel=0.01)
    assert scale.samples(scale.agreement(count)) == pytest.approx(count)
    assert NoiseScale({"a": math.inf}).agreement(9) == 0


@pytest.mark.parametrize(("noise", "right"), [(4.0, 0.75), (4 * math.sqrt(0.19) / 0.9, 0.856)])
def test_the_share_of_right_signs_follows_from_the_cosine(noise, right):
    """docs/initialization.md: N = B gives 75 %, a cosine of 0.9 gives 86 %."""
    count, equal = 16, []
    for seed in range(60):
        mean, gradients = drawn_gradients(count, 512, noise, seed)
        equal.append((gradients.sum(0).sign() == mean.sign()).double().mean().item())
    scale = NoiseScale({"a": noise**2})
    expected = 1 - math.acos(scale.agreement(count)) / math.pi
    assert expected == pytest.approx(right, abs=1e-3)
    assert sum(equal) / len(equal) == pytest.approx(expected, abs=0.01)


def test_a_model_is_measured_on_rows_of_its_gradients_and_left_as_it_was():
    """Against the definition, from per-sample gradients of the model's own loss in float64."""
    sizes, names = (1, 1, 2, 1), linear_names(llama())
    kept = []
    for batch in batches_for("llama", sizes):
        model = llama().eval().double()
        for i in range(len(batch["input_ids"])):
            row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            model(**row).loss.backward()
        kept.append({n: model.get_submodule(n).weight.grad for n in names})
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = noise_scale(model, batches_for("llama", sizes), sizes, names)
    for name in names:
        gradients = [grads[name] for grads in kept]
        rows = [i * len(gradients[0]) // min(len(gradients[0]), ROWS) for i in range(ROWS)]
        gradients = [g[rows] if len(g) > ROWS else g for g in gradients]
        squares = sum(g.square().sum() for g in gradients)
        count, squared = sum(sizes), sum(size**2 for size in sizes)
        mean = (sum(gradients).square().sum() - squares) / (count**2 - squared)
        variance = (squares - squared * mean) / count
        expected = variance / mean if mean > 0 else math.inf
        assert found.by_layer[name] == pytest.approx(float(expected), rel=1e-3), name
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_few_batches_are_refused():
    batch = [padded(samples(2))]
    with pytest.raises(ValueError, match="sizes are of 1 batches and there are 1"):
        noise_scale(llama(), batch, [2], linear_names(llama()))
    with pytest.raises(ValueError, match="sizes are of 3 batches and there are 1"):
        noise_scale(llama(), batch, [1, 1, 1], linear_names(llama()))
