"""What the LoRA-One paper (arXiv:2502.01235) proves for linear models, on random problems.

Inputs x ~ N(0, I), targets y = (W + Δ) x with Δ of rank r*, loss L = ‖ŷ − y‖² / 2N. The first
gradient is ∂L/∂W = −Δ XᵀX/N, which estimates −Δ.
"""

import pytest
import torch

from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.init.methods import lora_one
from lorasb_kernels.optim.preconditioned import PreconditionedAdamW

N, n, m, RANK = 2000, 24, 18, 4


class Problem:
    def __init__(self, seed: int, condition: float = 4.0):
        self.generator = torch.Generator().manual_seed(seed)
        left, right = (torch.linalg.qr(self.normal(k, RANK)).Q for k in (m, n))
        spectrum = torch.logspace(0, -1, RANK, base=condition, dtype=torch.float64)
        self.delta = left * spectrum @ right.T
        self.x, self.weight = self.normal(N, n), self.normal(m, n)
        self.target = self.x @ (self.weight + self.delta).T
        self.gradient = -self.delta @ self.x.T @ self.x / N
        U, _, Vt = torch.linalg.svd(self.gradient)
        self.U, self.V = U[:, :RANK], Vt[:RANK].T

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def gradients(self, A, B):
        A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
        y = lorasb_linear(self.x, self.weight, A, None, B)
        loss = (y - self.target).square().sum() / (2 * N)
        return loss.item(), *torch.autograd.grad(loss, (A, B))


def outside(basis, columns):
    """The largest share of a column space (of full rank) that lies outside span(basis)."""
    orthonormal = torch.linalg.qr(columns).Q
    return (orthonormal - basis @ (basis.T @ orthonormal)).norm(dim=0).max().item()


@pytest.fixture(params=[0, 1, 2])
def problem(request):
    return Problem(request.param)


def test_the_first_step_of_lora_lies_in_the_gradients_singular_subspace(problem):
    """B₀ = 0: B₁ = −η ∂L/∂W A₀ᵀ, whatever A₀; the column space is that of the gradient."""
    A, B = problem.normal(RANK, n) * 1e-2, torch.zeros(m, RANK, dtype=torch.float64)
    _, g_A, g_B = problem.gradients(A, B)
    assert not g_A.any()
    torch.testing.assert_close(g_B, problem.gradient @ A.T)
    assert outside(problem.U, B - 0.1 * g_B) < 1e-10
    assert outside(problem.U, problem.normal(m, RANK)) > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lora_turns_towards_that_subspace_and_lora_one_starts_in_it(seed):
    """Gradient descent from a small A₀ aligns A's rows; LoRA-One's are aligned at step 0."""
    problem = Problem(seed, condition=1.5)
    A, B = problem.normal(RANK, n) * 1e-8, torch.zeros(m, RANK, dtype=torch.float64)
    start = outside(problem.V, A.T)
    for _ in range(40):
        _, g_A, g_B = problem.gradients(A, B)
        A, B = A - 0.4 * g_A, B - 0.4 * g_B
    assert outside(problem.V, A.T) < 0.02 * start
    spectral = lora_one(problem.gradient, RANK, 1.0, "absolute", torch.Generator().manual_seed(0))
    assert outside(problem.V, spectral.lora_A.T.double()) < 1e-5
    assert outside(problem.U, spectral.lora_B.double()) < 1e-5


def test_one_step_suffices_up_to_the_sampling_error(problem):
    """With γ = s = 1 the start B₀A₀ is Δ up to ‖XᵀX/N − I‖ of it."""
    start = lora_one(problem.gradient, RANK, 1.0, "absolute", torch.Generator().manual_seed(0))
    A, B = start.lora_A.double(), start.lora_B.double()
    sampling = torch.linalg.matrix_norm(problem.x.T @ problem.x / N - torch.eye(n).double(), 2)
    error = torch.linalg.matrix_norm(B @ A - problem.delta, 2)
    assert error <= 1.01 * sampling * torch.linalg.matrix_norm(problem.delta, 2)
    loss, _, _ = problem.gradients(A, B)
    before, _, _ = problem.gradients(A, torch.zeros_like(B))
    assert loss < 0.1 * before


@pytest.mark.parametrize("condition", [1.5, 100.0])
def test_preconditioned_steps_converge_alike_for_every_condition_number(condition):
    """Each preconditioned step removes a fixed share of the error; plain descent stalls."""
    problem = Problem(3, condition)
    start = lora_one(problem.gradient, RANK, 0.3, "absolute", torch.Generator().manual_seed(0))
    first = last = None
    paths = {}
    for preconditioned in (True, False):
        A, B = start.lora_A.double(), start.lora_B.double()
        optimizer = PreconditionedAdamW([(A, B)])
        losses = []
        for _ in range(12):
            loss, g_A, g_B = problem.gradients(A, B)
            losses.append(loss)
            if preconditioned:
                (left,) = optimizer._inverse_grams([B.mT], 1e-12)
                (right,) = optimizer._inverse_grams([A], 1e-12)
                g_A, g_B = left @ g_A, g_B @ right
            A, B = A - 0.4 * g_A, B - 0.4 * g_B
        paths[preconditioned] = losses
    first, last = paths[True][0], paths[True][-1]
    assert last < 1e-6 * first
    if condition > 10:
        assert paths[False][-1] > 100 * last
