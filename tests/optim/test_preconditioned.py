"""`PreconditionedAdamW` against a dense float64 transcription, pair by pair."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.optim.preconditioned import PreconditionedAdamW, split_parameters
from tests.models import batches, build, few_steps

SHAPES = [(20, 12, 4), (20, 12, 4), (12, 20, 4), (16, 16, 3)]  # m, n, r
LR, BETAS, EPS, DECAY, DAMPING = 0.02, (0.8, 0.95), 1e-8, 0.1, 1e-3


def pairs_of(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.Parameter(values.to(dtype))

    return [(normal(r, n), normal(m, r)) for m, n, r in SHAPES]


def gradients_of(step):
    """The same gradients at every call, whatever the dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (
            torch.randn(r, n, generator=generator, dtype=torch.float64),
            torch.randn(m, r, generator=generator, dtype=torch.float64),
        )
        for m, n, r in SHAPES
    ]


class Dense:
    """arXiv:2502.01235, algorithm 1, for one pair in float64: inverses and AdamW as written."""

    def __init__(self, A, B, bias_correction):
        self.A, self.B = A.detach().double().clone(), B.detach().double().clone()
        self.bias_correction = bias_correction
        self.moments = {"A": [torch.zeros_like(self.A)] * 2, "B": [torch.zeros_like(self.B)] * 2}
        self.t = 0

    def step(self, gradient_A, gradient_B):
        self.t += 1
        identity = torch.eye(self.A.shape[0], dtype=torch.float64)
        preconditioner = torch.linalg.inv(self.B.T @ self.B + DAMPING * identity)
        self.A = self.adamw("A", self.A, preconditioner @ gradient_A)
        preconditioner = torch.linalg.inv(self.A @ self.A.T + DAMPING * identity)
        self.B = self.adamw("B", self.B, gradient_B @ preconditioner)

    def adamw(self, name, parameter, gradient):
        mean, square = self.moments[name]
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        self.moments[name] = [mean, square]
        if self.bias_correction:
            mean, square = mean / (1 - BETAS[0] ** self.t), square / (1 - BETAS[1] ** self.t)
        return parameter * (1 - LR * DECAY) - LR * mean / (square.sqrt() + EPS)


def optimizer_of(pairs, **options):
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "damping": DAMPING}
    return PreconditionedAdamW(pairs, **{**settings, **options})


def set_gradients(pairs, step):
    for pair, gradients in zip(pairs, gradients_of(step), strict=True):
        for factor, gradient in zip(pair, gradients, strict=True):
            factor.grad = gradient.to(factor.dtype)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_steps_equal_the_dense_reference(dtype, tolerance, bias_correction):
    pairs = pairs_of(dtype)
    dense = [Dense(A, B, bias_correction) for A, B in pairs]
    optimizer = optimizer_of(pairs, bias_correction=bias_correction)
    for step in range(5):
        set_gradients(pairs, step)
        optimizer.step()
        for reference, gradients in zip(dense, gradients_of(step), strict=True):
            reference.step(*gradients)
    for (A, B), reference in zip(pairs, dense, strict=True):
        torch.testing.assert_close(A.double(), reference.A, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(B.double(), reference.B, rtol=tolerance, atol=tolerance)
    assert optimizer.damped_steps == 0


def test_other_parameters_get_plain_adamw():
    head = torch.nn.Parameter(torch.randn(5, 3))
    plain = torch.nn.Parameter(head.detach().clone())
    pairs = pairs_of(torch.float32)
    ours = optimizer_of(pairs, others=[head])
    theirs = torch.optim.AdamW([plain], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(4):
        set_gradients(pairs, step)
        head.grad = torch.full_like(head, 0.1 * step + 0.01)
        plain.grad = head.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(head, plain, rtol=1e-6, atol=1e-7)


def test_gradient_directions_move_the_product_alike_however_its_scale_is_shared():
    """One gradient step along ĝ: (BĝA) is the same for (cB, A/c) when λ is small."""
    moved = []
    A, B = pairs_of(torch.float64)[0]
    g = torch.randn(B.shape[0], A.shape[1], dtype=torch.float64)
    for c in (1.0, 8.0):
        scaled_A, scaled_B = (A / c).detach(), (B * c).detach()
        optimizer = PreconditionedAdamW([(scaled_A, scaled_B)], damping=0.0)
        (left,) = optimizer._inverse_grams([scaled_B.mT], 0.0)
        moved.append(scaled_B @ left @ (scaled_B.T @ g))
    torch.testing.assert_close(moved[0], moved[1])


class TestIllConditioned:
    def test_a_rank_deficient_factor_is_damped_and_reported(self):
        pairs = pairs_of(torch.float32)
        with torch.no_grad():
            pairs[0][1][:, 1] = pairs[0][1][:, 0]  # two equal columns: BᵀB is singular
        optimizer = optimizer_of(pairs, damping=0.0)
        set_gradients(pairs, 0)
        # A singular Gram matrix may factor because of rounding; one rounded the other way cannot.
        gram = pairs[0][1].mT @ pairs[0][1]
        gram[1, 1] -= 2e-6 * gram[1, 1]
        inverse = optimizer._inverse(gram[None].detach(), 0.0, 20)
        assert inverse.isfinite().all()
        assert optimizer.damped_steps == 1
        # A matrix that rounding cannot explain is not a Gram matrix: it must not give a finite
        # result.
        gram[1, 1] -= 0.1 * gram[1, 1]
        assert optimizer._inverse(gram[None].detach(), 0.0, 20).isnan().all()

    def test_zero_factors_are_held_by_lambda(self):
        """LoRA's B = 0: the preconditioner is I/λ, and Adam takes its usual step."""
        pairs = pairs_of(torch.float32)
        with torch.no_grad():
            for _, B in pairs:
                B.zero_()
        optimizer = optimizer_of(pairs, damping=1e-6, weight_decay=0.0)
        before = [A.detach().clone() for A, _ in pairs]
        set_gradients(pairs, 0)
        optimizer.step()
        for (A, _), old in zip(pairs, before, strict=True):
            torch.testing.assert_close((A - old).abs(), torch.full_like(A, LR))

    def test_what_is_not_finite_stays_so_and_spoils_no_other_pair(self):
        pairs = pairs_of(torch.float32)
        with torch.no_grad():
            pairs[0][1][3, 1] = torch.nan
        optimizer = optimizer_of(pairs)
        set_gradients(pairs, 0)
        optimizer.step()
        assert not pairs[0][0].isfinite().any()
        assert all(factor.isfinite().all() for pair in pairs[1:] for factor in pair)


def test_a_state_dict_resumes_the_same_path():
    pairs = pairs_of(torch.float32)
    optimizer = optimizer_of(pairs)
    for step in range(2):
        set_gradients(pairs, step)
        optimizer.step()
    copies = copy.deepcopy(pairs)
    resumed = optimizer_of(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        for each, own in ((optimizer, pairs), (resumed, copies)):
            set_gradients(own, step)
            each.step()
    for pair, other in zip(pairs, copies, strict=True):
        assert all(map(torch.equal, pair, other))


def test_pairs_without_gradients_are_left_alone():
    pairs = pairs_of(torch.float32)
    optimizer = optimizer_of(pairs)
    set_gradients(pairs, 0)
    pairs[1][0].grad = pairs[1][1].grad = None
    before = [factor.detach().clone() for factor in pairs[1]]
    optimizer.step()
    assert all(map(torch.equal, pairs[1], before))
    pairs[1][0].grad = torch.ones_like(pairs[1][0])
    with pytest.raises(ValueError, match=r"B of a pair with shapes .* has no gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": -1.0}, "damping is -1.0; expected a finite number >= 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(pairs_of(torch.float32), **change)


def test_what_makes_no_pair_is_named():
    with pytest.raises(ValueError, match=r"pairs\[0\] has shapes \(4, 12\) and \(4, 20\)"):
        PreconditionedAdamW([(torch.zeros(4, 12), torch.zeros(4, 20))])
    with pytest.raises(ValueError, match="pairs is empty"):
        PreconditionedAdamW([])


def test_the_parameters_of_a_model():
    config = LoRASBConfig(3, init="lora", modules_to_save=("classifier",))
    model = adapt(build("roberta"), config)
    pairs, others = split_parameters(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for pair in pairs for p in pair} | {id(p) for p in others}
    assert others
    optimizer = PreconditionedAdamW(pairs, others, lr=1e-2)
    losses = few_steps(model, optimizer, batches("roberta", 1), 3)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="no LoRALinear"):
        split_parameters(adapt(build("roberta"), LoRASBConfig(3, init="orthogonal")))
