"""LoRA-Pro's gradients and steps against least squares in float64."""

import copy

import pytest
import torch

from lorasb_kernels.optim import LoRAProAdamW
from lorasb_kernels.optim.lora_pro import closest_gradients, solve_sylvester

M, N, R = 7, 9, 3


def problem(seed: int = 0, scaling: float = 0.5):
    generator = torch.Generator().manual_seed(seed)
    A, B, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((R, N), (M, R), (M, N))
    )
    return A, B, g, scaling * B.T @ g, scaling * g @ A.T, scaling


def nearest_equivalent(A, B, g, scaling):
    """The g̃ = s(g_B A + B g_A) nearest to g, by least squares over all entries of g_A and g_B."""
    columns = []
    for shape, expand in (((R, N), lambda u: B @ u), ((M, R), lambda u: u @ A)):
        for index in range(shape[0] * shape[1]):
            unit = torch.zeros(shape, dtype=A.dtype)
            unit.view(-1)[index] = 1
            columns.append(scaling * expand(unit).reshape(-1))
    basis = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(basis, g.reshape(-1, 1), driver="gelsd").solution
    return (basis @ solution).view(M, N)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 2.0])
def test_no_step_of_the_factors_is_nearer_to_the_gradient_of_the_weight(scaling):
    A, B, g, grad_A, grad_B, s = problem(scaling=scaling)
    g_A, g_B = closest_gradients(A, B, grad_A, grad_B, s)
    equivalent = s * (g_B @ A + B @ g_A)
    torch.testing.assert_close(equivalent, nearest_equivalent(A, B, g, s))
    # The plain gradients are further away, so the test can tell them apart.
    assert (s * (grad_B @ A + B @ grad_A) - g).norm() > (equivalent - g).norm() * 1.01


def test_of_the_nearest_the_ones_least_moved_are_taken():
    """Any other X gives the same equivalent gradient and moves g_A, g_B further."""
    A, B, _, grad_A, grad_B, s = problem(1)
    g_A, g_B = closest_gradients(A, B, grad_A, grad_B, s)

    def moved(X):
        return (g_A + X @ A - grad_A).square().sum() + (g_B - B @ X - grad_B).square().sum()

    generator = torch.Generator().manual_seed(2)
    least = moved(torch.zeros(R, R, dtype=torch.float64))
    for size in (1e-3, 1e-1, 1.0):
        X = size * torch.randn(R, R, generator=generator, dtype=torch.float64)
        assert moved(X) > least


def test_sylvester():
    A, B, *_ = problem(3)
    P, Q = B.T @ B, A @ A.T
    C = torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    X = solve_sylvester(P, Q, C)
    torch.testing.assert_close(P @ X + X @ Q, C)


def test_a_small_step_moves_the_weight_along_adams_direction():
    """To first order in the step, W moves by the nearest equivalent of Adam's step for W."""
    A, B, g, grad_A, grad_B, s = problem(5)
    equivalent = nearest_equivalent(A, B, g, s)
    # Adam's first step: the mean over the root of the mean square, here the sign.
    direction = nearest_equivalent(A, B, equivalent / (equivalent.abs() + 1e-8), s)
    lr = 1e-7
    a, b = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())
    a.grad, b.grad = grad_A, grad_B
    LoRAProAdamW([(a, b)], scaling=s, lr=lr, damping=0.0).step()
    step = s * (b.detach() @ a.detach() - B @ A) / -lr
    torch.testing.assert_close(step, direction, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_trains_from_zero_b():
    generator = torch.Generator().manual_seed(6)
    A = torch.nn.Parameter(torch.randn(R, N, generator=generator))
    B = torch.nn.Parameter(torch.zeros(M, R))
    target = torch.randn(M, R, generator=generator) @ torch.randn(R, N, generator=generator)
    optimizer = LoRAProAdamW([(A, B)], scaling=2.0, lr=2e-2)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (2.0 * B @ A - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_state_survives_saving():
    A, B, _, grad_A, grad_B, s = problem(7)

    def start():
        pair = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())
        for factor, gradient in zip(pair, (grad_A, grad_B), strict=True):
            factor.grad = gradient.clone()
        return pair, LoRAProAdamW([pair], scaling=s)

    pair, optimizer = start()
    optimizer.step()
    other, resumed = start()
    with torch.no_grad():
        for mine, theirs in zip(other, pair, strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    resumed.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, pair, strict=True))


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scaling_that_cannot_be_used_is_named(scaling):
    pair = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 2))
    with pytest.raises(ValueError, match="scaling is"):
        LoRAProAdamW([pair], scaling=scaling)
