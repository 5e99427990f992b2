"""Each initialization against a float64 transcription of its paper."""

import math

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.init.methods import kaiming_svd, lora_one, lora_sb, noise, scaled_b
from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.nn.linear import LoRASBLinear
from lorasb_kernels.targets import adapted_layers
from lorasb_kernels.train.config import TrainConfig
from tests.models import batches, build

R, GAMMA = 6, 16.0


def gradient(m=40, n=28, seed=0):
    """A gradient with decreasing singular values, fp32."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    spectrum = 3.0 * 0.8 ** torch.arange(n, dtype=torch.float64)
    return (left * spectrum @ right.T).float()


def generator():
    return torch.Generator().manual_seed(1)


def lora_one_of_the_paper(g, r, gamma, spectral_scaling):
    """arXiv:2502.01235: B₀ and A₀ from the SVD of −∇L, in float64; returns B₀A₀ and d."""
    U, S, Vt = torch.linalg.svd(-g.double(), full_matrices=False)
    if spectral_scaling == "relative":  # the published code: √S/√S₁, then /√γ
        d = S[:r].sqrt() / S[0].sqrt() / math.sqrt(gamma)
    else:  # algorithm 1: √γ·√S
        d = math.sqrt(gamma) * S[:r].sqrt()
    return (U[:, :r] * d) @ (d[:, None] * Vt[:r]), d


@pytest.mark.parametrize("spectral_scaling", ["relative", "absolute"])
def test_lora_one(spectral_scaling):
    g = gradient()
    adapter = lora_one(g, R, GAMMA, spectral_scaling, generator())
    product, d = lora_one_of_the_paper(g, R, GAMMA, spectral_scaling)
    assert adapter.lora_R is None
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close((adapter.lora_B @ adapter.lora_A).double(), product, **close)
    # The spectrum is shared: AAᵀ = BᵀB = diag(d²).
    squares = torch.diag(d**2).float()
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, squares, **close)
    torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, squares, **close)


def test_lora_one_starts_downhill_along_the_best_rank_r_step():
    """ "absolute": B₀A₀ is γ times the best rank-r approximation of the negative gradient."""
    g = gradient()
    adapter = lora_one(g, R, GAMMA, "absolute", generator())
    product = adapter.lora_B @ adapter.lora_A
    assert (g * product).sum() < 0
    U, S, Vt = torch.linalg.svd(g, full_matrices=False)
    best = (U[:, :R] * S[:R]) @ Vt[:R]
    torch.testing.assert_close(product, -GAMMA * best, rtol=1e-3, atol=1e-3)


def test_lora_one_of_a_zero_gradient_is_zero():
    for spectral_scaling in ("relative", "absolute"):
        adapter = lora_one(torch.zeros(8, 6), 2, GAMMA, spectral_scaling, generator())
        assert not adapter.lora_A.any()
        assert not adapter.lora_B.any()


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_scaled_b_is_the_same_adapter_with_sigma_in_b(scaling):
    signs = SignMatrix.from_dense(gradient().sign())
    (plain,) = lora_sb([signs], R, 1e-2, scaling, generator())
    scaled = scaled_b(plain, scaling)

    def product(adapter):
        return scaling * adapter.lora_B @ adapter.lora_R @ adapter.lora_A

    torch.testing.assert_close(product(scaled), product(plain), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled.lora_R, torch.eye(R) / scaling)
    S = torch.linalg.svdvals(-1e-2 * gradient().sign().double())[:R].float()
    torch.testing.assert_close(scaled.lora_B.norm(dim=0), S, rtol=1e-3, atol=1e-6)


def test_scaled_b_of_a_gradient_of_low_rank_still_has_an_optimal_gradient():
    """Then B = U S has zero columns; the core's gradient there is 0, and finite."""
    signs = SignMatrix.from_dense(torch.ones(12, 10))  # rank 1
    (plain,) = lora_sb([signs], 3, 1e-2, 1.0, generator())
    adapter = scaled_b(plain, 1.0)
    layer = LoRASBLinear(10, 12, 3, optimal_gradient=True)
    layer.set_adapter(adapter.lora_A, adapter.lora_R, adapter.lora_B)
    layer(torch.randn(5, 10)).sum().backward()
    gradient = layer.lora_R.grad
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert not gradient[1:].any()


def test_kaiming_svd_decomposes_a_kaiming_uniform_matrix():
    m, n, s = 60, 36, 0.5
    adapter = kaiming_svd(torch.Size((m, n)), n, s, generator(), torch.device("cpu"))
    product = s * adapter.lora_B @ adapter.lora_R @ adapter.lora_A  # full rank: the matrix itself
    bound = 1 / math.sqrt(n)
    assert product.abs().max() <= bound * 1.001
    torch.testing.assert_close(product.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)
    torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, torch.eye(n), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def full_gradients():
    """∂L/∂W of the mean loss over all samples, by ordinary backward passes."""
    model, data = build("roberta").double(), batches("roberta")
    for parameter in model.parameters():
        parameter.grad = None
    count = sum(len(batch["labels"]) for batch in data)
    for batch in data:
        (model(**batch).loss * len(batch["labels"]) / count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spectral_scaling", ["relative", "absolute"])
def test_lora_one_on_a_model(full_gradients, spectral_scaling):
    """From the estimation engine; W is not offset, and s does not enter the factors."""
    plain = build("roberta").double()
    config = LoRASBConfig(
        3,
        ("query", "value"),
        "lora-one",
        lora_alpha=6.0,
        use_rslora=True,
        gamma=GAMMA,
        spectral_scaling=spectral_scaling,
    )
    model = adapt(build("roberta").double(), config, batches("roberta"), progress=False)
    for name, layer in adapted_layers(model).items():
        assert layer.scaling == 6 / math.sqrt(3)
        g = full_gradients[f"{name}.weight"]
        product, _ = lora_one_of_the_paper(g, 3, GAMMA, spectral_scaling)
        scale = product.abs().max()
        difference = (layer.lora_B @ layer.lora_A).detach() - product
        assert difference.abs().max() < 2e-3 * scale, name
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
        assert layer.init_report.captured_energy > 0


def test_lora_one_needs_batches_but_no_learning_rate():
    config = LoRASBConfig(3, ("query",), "lora-one")
    with pytest.raises(ValueError, match="expected batches, as init='lora-one' needs gradients"):
        adapt(build("roberta"), config)


@pytest.mark.parametrize("std", [1e-3, 1e-2])
def test_noise_has_the_standard_deviation_that_was_asked_for(std):
    """At full rank the product is the noisy update itself: beyond −η·signs, it is the noise."""
    s, eta = 0.5, 1e-3
    signs = gradient().sign()
    r, count = min(signs.shape), signs.numel()
    adapter = noise(SignMatrix.from_dense(signs), r, eta, s, std, generator())
    product = s * (adapter.lora_B @ adapter.lora_R @ adapter.lora_A).double()
    added = product + eta * signs.double()
    deviation = 4 / math.sqrt(2 * count)  # four standard errors
    torch.testing.assert_close(added.std().item(), std, rtol=deviation, atol=0)
    assert added.mean().abs() < 4 * std / math.sqrt(count)


def test_the_config_hands_its_standard_deviations_on():
    """Against the same model without noise, at full rank; and what is asked for by default."""
    deltas = {}
    for init, changes in (("lora-sb", {}), ("noise", {"noise_std": 0.05})):
        config = LoRASBConfig(32, ("query",), init, **changes)
        model = adapt(
            build("roberta").double(),
            config,
            batches("roberta"),
            learning_rate=1e-2,
            progress=False,
        )
        layers = adapted_layers(model).values()
        deltas[init] = torch.cat([layer.get_delta_weight().flatten() for layer in layers])
    added = deltas["noise"] - deltas["lora-sb"]
    deviation = 4 / math.sqrt(2 * added.numel())
    torch.testing.assert_close(added.std().item(), 0.05, rtol=deviation, atol=0)

    model = adapt(build("roberta"), LoRASBConfig(32, ("query",), "lora-xs"), progress=False)
    cores = torch.cat([layer.lora_R.flatten() for layer in adapted_layers(model).values()])
    deviation = 4 / math.sqrt(2 * cores.numel())
    torch.testing.assert_close(cores.std().item(), 1e-5, rtol=deviation, atol=0)
    # Table 5 of arXiv:2411.19557 and section 3 of arXiv:2405.17604.
    assert (LoRASBConfig(1).noise_std, LoRASBConfig(1).core_std) == (1e-5, 1e-5)
    settings = {"model": "m", "data": "d", "output_dir": "o"}
    assert TrainConfig(**settings, method="noise").noise_std == 1e-5


@pytest.mark.parametrize("side", ["B", "A", None])
def test_sigma_is_on_the_side_that_was_asked_for(side):
    """B by default, as in the paper; the other factor is orthonormal."""
    base = build("roberta")
    changes = {} if side is None else {"sigma_side": side}
    config = LoRASBConfig(4, ("query", "dense"), "lora-xs", **changes)
    model = adapt(build("roberta"), config, progress=False)
    for name, layer in adapted_layers(model).items():
        S = torch.linalg.svdvals(base.get_submodule(name).weight.detach())[:4]
        norms = {"A": layer.lora_A.norm(dim=1), "B": layer.lora_B.norm(dim=0)}
        carries = norms.pop(side or "B")
        torch.testing.assert_close(carries, S, rtol=1e-3, atol=1e-5, msg=name)
        (other,) = norms.values()
        torch.testing.assert_close(other, torch.ones(4), rtol=1e-4, atol=0, msg=name)


@pytest.mark.parametrize("name", ["kaiming-svd", "scaled-b", "noise"])
def test_ablations_on_a_model(name):
    data = batches("roberta") if name != "kaiming-svd" else None
    config = LoRASBConfig(3, ("query",), name, optimal_gradient=name == "scaled-b")
    model = adapt(build("roberta"), config, data, learning_rate=1e-2, progress=False)
    model(**batches("roberta")[0]).loss.backward()
    for layer in adapted_layers(model).values():
        assert layer.lora_R.grad.abs().sum() > 0
        assert layer.lora_R.detach().abs().sum() > 0


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_theorem_6_lora_sb_of_gradient_descent_starts_at_its_first_step(scaling):
    """W + s·B·R·A is W − η·∇L of the mean loss over samples, as far as rank r goes."""
    data = batches("roberta")
    plain = build("roberta").double()
    loss = sum(plain(**batch).loss * len(batch["labels"]) for batch in data)
    (loss / sum(len(batch["labels"]) for batch in data)).backward()
    full_gradients = {name: p.grad for name, p in plain.named_parameters()}
    eta, r = 0.3, 3
    config = LoRASBConfig(r, ("query", "value"), "lora-sb-sgd", scaling=scaling)
    model = adapt(build("roberta"), config, data, learning_rate=eta, progress=False)
    for name, layer in adapted_layers(model).items():
        U, S, Vt = torch.linalg.svd(-eta * full_gradients[f"{name}.weight"])
        step = (U[:, :r] * S[:r]) @ Vt[:r]
        product = (scaling * layer.lora_B @ layer.lora_R @ layer.lora_A).detach().double()
        assert (product - step).norm() < 1e-3 * step.norm(), name
        for gram in (layer.lora_B.T @ layer.lora_B, layer.lora_A @ layer.lora_A.T):
            torch.testing.assert_close(gram, torch.eye(r), rtol=0, atol=1e-5)


def test_random_ab_draws_what_lora_xs_compares_its_svd_with():
    """Bounds of the published code: 1/√r for A, 1/√m for B; R of standard deviation σ."""
    layer = torch.nn.Linear(600, 400)
    config = LoRASBConfig(64, init="random-ab", core_std=1e-3, lora_alpha=16)
    model = adapt(torch.nn.Sequential(layer), config)
    adapted = model[0]
    for factor, bound in ((adapted.lora_A, 1 / 8), (adapted.lora_B, 1 / 20)):
        assert factor.abs().max() <= bound
        torch.testing.assert_close(factor.std().item(), bound / 3**0.5, rtol=0.02, atol=0)
    torch.testing.assert_close(adapted.lora_R.std().item(), 1e-3, rtol=0.05, atol=0)
    assert adapted.scaling == 16 / 64
    again = adapt(torch.nn.Sequential(torch.nn.Linear(600, 400)), config)[0]
    assert torch.equal(again.lora_B, adapted.lora_B)
