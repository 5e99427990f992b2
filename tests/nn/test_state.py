"""The state of an adapted layer: merged or not, pickled, in another dtype."""

import io
import pickle

import pytest
import torch
from torch import nn

from lorasb_kernels import LoRALinear, LoRASBConfig, LoRASBLinear, adapt
from tests.models import batches, build

KINDS = [LoRASBLinear, LoRALinear]


def layer(kind=LoRASBLinear, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    adapted = kind.from_linear(nn.Linear(24, 16, dtype=dtype), 4, scaling=0.5, **options)
    with torch.no_grad():
        for factor in adapted.factors().values():
            factor.normal_(std=0.5)
    return adapted


def plain_weight(adapted):
    """W without the adapter, in float64, of a layer that is not merged."""
    assert not adapted.merged
    return adapted.weight.detach().double()


@pytest.mark.parametrize("kind", KINDS)
class TestMergedState:
    def test_a_merged_state_dict_makes_the_layer_merged(self, kind):
        saved = layer(kind)
        weight, x = plain_weight(saved), torch.randn(5, 24)
        expected = saved(x)
        saved.merge()
        loaded = layer(kind, seed=1)
        loaded.load_state_dict(saved.state_dict())
        assert loaded.merged
        assert torch.equal(loaded(x), saved(x))
        loaded.unmerge()
        torch.testing.assert_close(loaded(x), expected)
        torch.testing.assert_close(plain_weight(loaded), weight, rtol=1e-6, atol=1e-6)

    def test_a_plain_state_dict_makes_a_merged_layer_plain(self, kind):
        saved, loaded = layer(kind), layer(kind, seed=1)
        loaded.merge(keep_original=True)
        loaded.load_state_dict(saved.state_dict())
        assert not loaded.merged
        x = torch.randn(5, 24)
        assert torch.equal(loaded(x), saved(x))
        loaded.unmerge()
        assert torch.equal(loaded.weight, saved.weight)

    def test_the_state_dict_of_a_plain_layer_has_no_trace_of_merging(self, kind):
        adapted = layer(kind)
        names = set(adapted.state_dict())
        adapted.merge()
        adapted.unmerge()
        assert set(adapted.state_dict()) == names == {"weight", "bias", *adapted.factors()}

    def test_a_partial_state_dict_does_not_change_what_is_merged(self, kind):
        adapted = layer(kind)
        weight = plain_weight(adapted)
        adapted.merge()
        name = adapted.trained[0]
        other = {name: torch.randn_like(getattr(adapted, name))}
        adapted.load_state_dict(other, strict=False)
        adapted.unmerge()
        torch.testing.assert_close(plain_weight(adapted), weight, rtol=1e-6, atol=1e-6)
        assert torch.equal(getattr(adapted, name), other[name])

    def test_unmerging_takes_out_what_was_merged_whatever_changed_since(self, kind):
        adapted = layer(kind)
        weight, x = plain_weight(adapted), torch.randn(5, 24)
        adapted.merge()
        merged = adapted(x)
        with torch.no_grad():
            for name in adapted.trained:
                getattr(adapted, name).normal_()
        adapted.scaling = 2.0
        assert torch.equal(adapted(x), merged)
        adapted.unmerge()
        torch.testing.assert_close(plain_weight(adapted), weight, rtol=1e-6, atol=1e-6)

    def test_a_merged_layer_refuses_to_be_reset(self, kind):
        adapted = layer(kind)
        adapted.merge()
        with pytest.raises(
            RuntimeError, match=r"merged; expected unmerge\(\) before reset_adapter"
        ):
            adapted.reset_adapter()

    def test_a_merged_bf16_layer_keeps_what_was_merged_in_fp32(self, kind):
        adapted = layer(kind)
        adapted.merge()
        adapted.bfloat16()
        assert adapted.merged_A.dtype == adapted.merged_B.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
class TestPickling:
    def test_a_saved_module_is_the_same_and_trains_on(self, kind):
        adapted = layer(kind)
        file = io.BytesIO()
        torch.save(adapted, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        x = torch.randn(5, 24)
        assert torch.equal(loaded(x), adapted(x))
        loaded(x).sum().backward()
        assert all(getattr(loaded, name).grad is not None for name in loaded.trained)

    def test_a_pickled_layer_refreshes_its_gradient_factors_on_loading(self, kind):
        options = {} if kind is LoRALinear else {"optimal_gradient": True}
        source = layer(kind, **options)
        loaded = pickle.loads(pickle.dumps(layer(kind, seed=1, **options)))
        loaded.load_state_dict(source.state_dict())
        if kind is LoRASBLinear:
            gram = source.lora_A.double() @ source.lora_A.double().T
            expected = torch.linalg.inv(gram).float()
            torch.testing.assert_close(loaded.gradient_right, expected, rtol=1e-4, atol=1e-5)


def test_a_pickled_model_computes_the_same():
    model = adapt(build("llama"), LoRASBConfig(4, init="orthogonal", share_inputs=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    loaded = pickle.loads(pickle.dumps(model))
    batch = batches("llama")[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("convert", ["double", "float", "bfloat16", "half"])
def test_every_dtype_after_every_other(kind, start, convert):
    adapted = layer(kind, dtype=start)
    before = {name: getattr(adapted, name).detach().clone() for name in adapted.trained}
    adapted(torch.randn(5, 24, dtype=start)).sum().backward()
    getattr(adapted, convert)()
    dtype = adapted.weight.dtype
    master = torch.promote_types(dtype, torch.float32)
    y = adapted(torch.randn(5, 24, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    for name, values in before.items():
        trained = getattr(adapted, name)
        assert trained.dtype == trained.grad.dtype == master
        assert torch.equal(trained, values.to(master))
