"""`LoRASBLinear` as an `nn.Linear`: sharing, dtypes, merging, the optimal gradient."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasb_kernels import LoRASBLinear


def layer(n=24, m=16, r=4, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    adapted = LoRASBLinear.from_linear(nn.Linear(n, m, dtype=dtype), r, **options)
    with torch.no_grad():
        adapted.lora_R.normal_(std=0.5)
    return adapted


def test_from_linear_shares_storage_and_leaves_the_original_alone():
    linear = nn.Linear(24, 16)
    adapted = LoRASBLinear.from_linear(linear, 4)
    assert adapted.weight.data_ptr() == linear.weight.data_ptr()
    assert adapted.bias.data_ptr() == linear.bias.data_ptr()
    assert linear.weight.requires_grad
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == ["lora_R"]
    assert isinstance(adapted, nn.Linear)


def test_a_new_layer_computes_the_frozen_layer():
    linear = nn.Linear(24, 16)
    x = torch.randn(5, 24)
    torch.testing.assert_close(LoRASBLinear.from_linear(linear, 4)(x), linear(x))


def test_a_new_layer_has_orthonormal_factors():
    adapted = layer()
    torch.testing.assert_close(adapted.lora_A @ adapted.lora_A.T, torch.eye(4))
    torch.testing.assert_close(adapted.lora_B.T @ adapted.lora_B, torch.eye(4))


def test_delta_weight_is_what_forward_adds():
    adapted = layer(scaling=0.5)
    x = torch.randn(5, 24)
    expected = x @ (adapted.weight + adapted.get_delta_weight()).T + adapted.bias
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16])
def test_the_core_stays_fp32(convert):
    adapted = layer()
    before = adapted.lora_R.detach().clone()
    adapted(torch.randn(5, 24)).sum().backward()
    gradient = adapted.lora_R.grad.clone()
    convert(adapted)
    assert adapted.weight.dtype == adapted.lora_A.dtype == adapted.lora_B.dtype != torch.float32
    assert adapted.lora_R.dtype == adapted.lora_R.grad.dtype == torch.float32
    assert torch.equal(adapted.lora_R, before)
    assert torch.equal(adapted.lora_R.grad, gradient)
    y = adapted(torch.randn(5, 24, dtype=adapted.weight.dtype))
    assert y.dtype == adapted.weight.dtype


def test_meta_and_to_empty():
    meta = LoRASBLinear(24, 16, 4, device="meta", dtype=torch.bfloat16)
    assert meta.lora_R.is_meta
    assert meta.lora_R.dtype == torch.float32
    empty = meta.to_empty(device="cpu")
    assert empty.lora_R.device.type == "cpu"
    assert empty.lora_R.dtype == torch.float32


def test_autocast():
    adapted = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(torch.randn(5, 24))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert adapted.lora_R.grad.dtype == torch.float32


def test_deepcopy_is_independent():
    adapted = layer()
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        twin.lora_R.zero_()
        twin.weight.zero_()
    assert adapted.lora_R.abs().sum() > 0
    assert adapted.weight.abs().sum() > 0


def test_state_dict_round_trip():
    adapted = layer(scaling=0.5, optimal_gradient=True)
    with torch.no_grad():
        adapted.lora_A.mul_(3)
    file = io.BytesIO()
    torch.save(adapted.state_dict(), file)
    file.seek(0)
    fresh = layer(seed=1, scaling=0.5, optimal_gradient=True)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 24)
    assert torch.equal(fresh(x), adapted(x))
    right = torch.linalg.inv(adapted.lora_A @ adapted.lora_A.T)
    torch.testing.assert_close(fresh.gradient_right, right)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(use_reentrant, dropout):
    adapted = layer(dropout=dropout)
    x = torch.randn(5, 24, requires_grad=True)
    torch.manual_seed(9)
    adapted(x).square().sum().backward()
    expected = adapted.lora_R.grad.clone(), x.grad.clone()
    adapted.lora_R.grad = x.grad = None
    torch.manual_seed(9)
    checkpoint(adapted, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(adapted.lora_R.grad, expected[0])
    assert torch.equal(x.grad, expected[1])


def test_compiles_without_graph_breaks():
    adapted = layer(dropout=0.1, optimal_gradient=True, scaling=0.5).eval()
    compiled = torch.compile(adapted, fullgraph=True)
    x = torch.randn(5, 24)
    torch.testing.assert_close(compiled(x), adapted(x))
    compiled(x).sum().backward()
    gradient = adapted.lora_R.grad.clone()
    adapted.lora_R.grad = None
    adapted(x).sum().backward()
    torch.testing.assert_close(gradient, adapted.lora_R.grad)


class TestMerging:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_rounding_of_the_fp32_product(self, dtype):
        adapted = layer(dtype=dtype, scaling=0.5)
        weight = adapted.weight.detach().clone()
        exact = 0.5 * adapted.lora_B.double() @ adapted.lora_R.double() @ adapted.lora_A.double()
        adapted.merge()
        assert adapted.merged
        error = (adapted.weight.double() - (weight.double() + exact)).abs()
        rounding = torch.finfo(dtype).eps / 2 * (weight.double() + exact).abs()
        assert (error <= rounding + 1e-6).all()

    def test_a_merged_forward_is_a_plain_linear(self):
        adapted = layer()
        x = torch.randn(5, 24)
        expected = adapted(x)
        adapted.merge()
        torch.testing.assert_close(adapted(x), expected)
        assert torch.equal(adapted(x), nn.functional.linear(x, adapted.weight, adapted.bias))
        assert torch.equal(adapted.to_linear()(x), adapted(x))

    def test_unmerge_restores_to_a_rounding_or_exactly(self):
        adapted = layer(dtype=torch.bfloat16)
        weight = adapted.weight.detach().clone()
        adapted.merge()
        adapted.unmerge()
        torch.testing.assert_close(adapted.weight, weight, rtol=2**-7, atol=2**-7)
        adapted.weight.data.copy_(weight)
        adapted.merge(keep_original=True)
        adapted.unmerge()
        assert torch.equal(adapted.weight, weight)

    def test_merging_twice_changes_nothing(self):
        adapted = layer()
        adapted.merge()
        weight = adapted.weight.detach().clone()
        adapted.merge()
        assert torch.equal(adapted.weight, weight)
        adapted.unmerge()
        adapted.unmerge()
        assert not adapted.merged

    def test_safe_merge_refuses_non_finite_and_changes_nothing(self):
        adapted = layer()
        weight = adapted.weight.detach().clone()
        with torch.no_grad():
            adapted.lora_R[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            adapted.merge(safe_merge=True)
        assert torch.equal(adapted.weight, weight)
        assert not adapted.merged

    def test_a_merged_layer_refuses_new_factors(self):
        adapted = layer()
        adapted.merge()
        with pytest.raises(RuntimeError, match="merged"):
            adapted.set_adapter(adapted.lora_A, adapted.lora_R, adapted.lora_B)


class TestOptimalGradient:
    def test_costs_nothing_where_it_changes_nothing(self):
        assert layer(optimal_gradient=True).gradient_left is None
        assert layer(optimal_gradient=True, dtype=torch.bfloat16).gradient_left is None

    @pytest.mark.parametrize("orthonormal", [True, False])
    @pytest.mark.parametrize("before", [1.0, 0.5])
    @pytest.mark.parametrize("after", [1.0, 0.25])
    def test_follows_a_changed_scaling(self, orthonormal, before, after):
        adapted = layer(scaling=before, optimal_gradient=True, dtype=torch.float64)
        A, B = adapted.lora_A.clone(), adapted.lora_B.clone()
        if not orthonormal:
            A, B = torch.randn(4, 24).double(), torch.randn(16, 4).double()
            adapted.set_adapter(A, adapted.lora_R, B)
        adapted.scaling = after
        x, dy = torch.randn(5, 24).double(), torch.randn(5, 16).double()
        adapted(x).backward(dy)
        plain = B.T @ (dy.T @ x) @ A.T
        expected = torch.linalg.inv(B.T @ B) @ plain @ torch.linalg.inv(A @ A.T) / after
        torch.testing.assert_close(adapted.lora_R.grad, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("scaling", [1.0, 0.25])
    def test_equals_theorem_3(self, scaling):
        adapted = layer(scaling=scaling, optimal_gradient=True, dtype=torch.float64)
        A, B = torch.randn(4, 24).double(), torch.randn(16, 4).double()
        adapted.set_adapter(A, adapted.lora_R, B)
        x, dy = torch.randn(5, 24).double(), torch.randn(5, 16).double()
        adapted(x).backward(dy)
        plain = scaling * B.T @ (dy.T @ x) @ A.T
        expected = torch.linalg.inv(B.T @ B) @ plain @ torch.linalg.inv(A @ A.T) / scaling**2
        torch.testing.assert_close(adapted.lora_R.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 17}, "r is 17; expected 1 <= r <= 16 for a layer of 24 inputs and 16 outputs"),
        ({"r": 4, "scaling": 0.0}, "scaling is 0.0"),
        ({"r": 4, "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRASBLinear(24, 16, **arguments)


def test_factors_of_the_wrong_shape_are_refused():
    adapted = layer()
    with pytest.raises(ValueError, match=r"lora_A has shape \(4, 23\); expected \(4, 24\)"):
        adapted.set_adapter(torch.ones(4, 23), adapted.lora_R, adapted.lora_B)


def test_repr_says_what_it_is():
    text = repr(layer(scaling=0.5, dropout=0.1, init="lora-sb", backend="reference"))
    for part in ("r=4", "scaling=0.5", "init='lora-sb'", "backend='reference'", "dropout=0.1"):
        assert part in text
