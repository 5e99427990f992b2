"""What makes the step of R optimal: the gradient (for descent), the factors, the step itself."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from lorasb_kernels.init.methods import Adapter, orthonormal
from lorasb_kernels.optim import correct_steps
from lorasb_kernels.targets import adapted_layers
from lorasb_kernels.train.config import TrainConfig
from tests.models import batches, build

STEPS = 4


def model(**changes):
    config = LoRASBConfig(4, **{"init": "lora-xs", "core_std": 0.1, **changes})
    return adapt(build("llama").double(), config, progress=False)


def descend(adapted, kind: str, corrected: bool = False) -> torch.Tensor:
    """Logits after a few steps on one batch, all in float64."""
    (batch, *_) = batches("llama")
    cores = [p for p in adapted.parameters() if p.requires_grad]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(cores, lr=1e-2, eps=1e-30)
    else:
        optimizer = torch.optim.SGD(cores, lr=1e-1)
    if corrected:
        correct_steps(optimizer, adapted)
    for _ in range(STEPS):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return adapted(**batch).logits


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("deficient", [False, True])
def test_orthonormal_factors_give_the_same_product(deficient):
    generator = torch.Generator().manual_seed(0)
    A, R, B = (torch.randn(s, generator=generator) for s in ((3, 9), (3, 3), (7, 3)))
    if deficient:
        B[:, 1] = 0
    changed = orthonormal(Adapter(A, R, B))
    product = changed.lora_B.double() @ changed.lora_R.double() @ changed.lora_A.double()
    expected = B.double() @ R.double() @ A.double()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
    identity = torch.eye(3)
    torch.testing.assert_close(changed.lora_A @ changed.lora_A.T, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(changed.lora_B.T @ changed.lora_B, identity, rtol=0, atol=1e-6)


def test_an_orthonormalized_model_computes_the_same():
    (batch, *_) = batches("llama")
    plain, changed = model(), model(orthonormalize=True)
    torch.testing.assert_close(changed(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-6)
    for layer in adapted_layers(changed).values():
        gram = layer.lora_B.T @ layer.lora_B
        torch.testing.assert_close(gram, torch.eye(4, dtype=gram.dtype), rtol=0, atol=1e-6)


def test_an_orthonormalized_lora_xs_is_rebuilt_from_the_weight(tmp_path):
    (batch, *_) = batches("llama")
    config = LoRASBConfig(4, init="lora-xs", core_std=0.1, orthonormalize=True)
    saved = adapt(build("llama"), config, progress=False)
    save_adapter(saved, tmp_path)
    loaded = load_adapter(build("llama"), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, saved(**batch).logits)


def diagonal(**changes) -> torch.nn.Module:
    """A model whose AAᵀ and BᵀB are diagonal to float64's rounding, as in LoRA-XS."""
    adapted = model(**changes)
    scale = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    for layer in adapted_layers(adapted).values():
        A, B = torch.linalg.qr(layer.lora_A.T).Q.T, torch.linalg.qr(layer.lora_B).Q
        layer.set_adapter(A * scale.flip(0)[:, None], layer.lora_R, B * scale)
    return adapted


def test_adamw_does_not_notice_the_optimal_gradient_where_descent_does():
    """With diagonal AAᵀ and BᵀB the gradient's elements are scaled by positive numbers."""
    plain, optimal = diagonal(), diagonal(optimal_gradient=True)
    assert close(descend(copy.deepcopy(optimal), "adamw"), descend(copy.deepcopy(plain), "adamw"))
    assert not close(descend(optimal, "sgd"), descend(plain, "sgd"))


def skewed() -> torch.nn.Module:
    """`model()` with the same B·R·A, its scale split differently between the factors."""
    changed = model()
    scale = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    for layer in adapted_layers(changed).values():
        R = layer.lora_R / scale[:, None] / scale
        layer.set_adapter(layer.lora_A * scale[:, None], R, layer.lora_B * scale)
    return changed


def orthonormalized(adapted: torch.nn.Module) -> torch.nn.Module:
    for layer in adapted_layers(adapted).values():
        found = orthonormal(Adapter(layer.lora_A, layer.lora_R, layer.lora_B))
        layer.set_adapter(found.lora_A, found.lora_R, found.lora_B)
    return adapted


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_theorem_5_with_orthonormal_factors_holds_under_any_optimizer(kind):
    """The path does not depend on how the scale is split between A, R and B."""
    path = descend(orthonormalized(model()), kind)
    torch.testing.assert_close(descend(orthonormalized(skewed()), kind), path, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(descend(skewed(), kind), descend(model(), kind), rtol=1e-3, atol=1e-4)


def test_the_corrected_step_of_descent_is_that_of_the_corrected_gradient():
    gradient = descend(model(optimal_gradient=True, scaling=0.5), "sgd")
    step = descend(model(scaling=0.5), "sgd", corrected=True)
    assert close(step, gradient)


def test_the_corrected_step_is_noticed_by_adamw():
    plain, corrected = descend(model(), "adamw"), descend(model(), "adamw", corrected=True)
    assert not torch.allclose(plain, corrected, rtol=1e-3, atol=1e-4)


def test_a_correction_can_be_taken_off_again():
    adapted = model()
    cores = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(cores, lr=1.0)
    for handle in correct_steps(optimizer, adapted):
        handle.remove()
    before = [core.detach().clone() for core in cores]
    for core in cores:
        core.grad = torch.ones_like(core)
    optimizer.step()
    for core, start in zip(cores, before, strict=True):
        torch.testing.assert_close(core.detach(), start - 1)


def test_what_cannot_be_corrected_is_named():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="optimal_gradient is True; expected False"):
        correct_steps(optimizer, model(optimal_gradient=True))
    with pytest.raises(ValueError, match="trains no core"):
        correct_steps(optimizer, model(init="lora"))
    with pytest.raises(ValueError, match="orthonormalize is True; expected False"):
        LoRASBConfig(4, init="lora", orthonormalize=True)


def test_the_trainer_warns_that_adamw_does_not_notice():
    settings = {"model": "m", "data": "d", "output_dir": "o", "method": "lora-xs"}
    with pytest.warns(UserWarning, match="AdamW trains the cores and hardly notices it"):
        TrainConfig(**settings, optimal_gradient=True)
