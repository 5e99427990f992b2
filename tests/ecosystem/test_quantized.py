"""Adapters over quantized bases, with the real bitsandbytes and torchao on the CPU."""

import copy
import gc
import weakref

import bitsandbytes
import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
    Int4TilePackedTo4dTensor,
)

from lorasb_kernels import (
    LoRASBConfig,
    adapt,
    adapters_disabled,
    describe,
    explain,
    load_adapter,
    merge_and_unload,
    merge_checkpoint,
    reference_model,
    save_adapter,
)
from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.init import estimate_gradients
from lorasb_kernels.nn.linear import LoRALinear, LoRASBLinear
from lorasb_kernels.nn.quantized import QuantizedLoRALinear, QuantizedLoRASBLinear
from lorasb_kernels.quantization import dense_weight, quantization_of
from lorasb_kernels.targets import adapted_layers, find_targets
from tests.ecosystem.quantizers import QUANTIZERS, quantize_model
from tests.models import batches, build, few_steps

KINDS = pytest.mark.parametrize("kind", QUANTIZERS)
CONFIG = LoRASBConfig(r=4, init="orthogonal", scaling=0.5)


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(64, 96).to(dtype)


def layers(kind, dtype=torch.float32, **options):
    """An adapted quantized layer, and an adapted plain one over the dequantized weight."""
    base = linear(dtype)
    layer = QuantizedLoRASBLinear.from_linear(QUANTIZERS[kind](base), 8, scaling=0.5, **options)
    layer.lora_R.data.normal_()
    plain = copy.deepcopy(base)
    plain.weight.data = dense_weight(layer).to(dtype)
    twin = LoRASBLinear.from_linear(plain, 8, scaling=0.5, **options)
    twin.set_adapter(layer.lora_A, layer.lora_R, layer.lora_B)
    return layer, twin


def step(layer, x, dy, seed=0):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.lora_R.grad


def quantized(kind, seed=0):
    return quantize_model(build("llama", seed), kind)


def adapted(kind, config=CONFIG):
    model = adapt(quantized(kind), config, progress=False)
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.normal_(std=0.3)
    return model


def dequantized(model):
    """A copy whose quantized layers are plain ones over the dequantized weights."""
    plain = build("llama")
    for name, module in model.named_modules():
        if quantization_of(module) is not None:
            plain.get_submodule(name).weight.data = dense_weight(module).float()
    return plain


def logits(model):
    with torch.no_grad():
        return model(**batches("llama")[0]).logits


@KINDS
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.3), (torch.bfloat16, 0.0)])
def test_it_computes_the_adapted_layer_over_the_dequantized_weight(kind, dtype, dropout):
    layer, twin = layers(kind, dtype, dropout=dropout)
    assert quantization_of(layer) == kind
    x, dy = torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 5, 96, dtype=dtype)
    for own, plain in zip(step(layer, x, dy), step(twin, x, dy), strict=True):
        assert own.dtype == plain.dtype
        error = (own - plain).norm() / plain.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 5e-4)


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_the_frozen_product_is_the_quantizers_own(kind, training):
    layer, _ = layers(kind)
    layer.lora_R.data.zero_()
    layer.train(training)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base_layer(x))


@KINDS
def test_only_h_is_kept_for_backward(kind):
    layer, _ = layers(kind)
    lasting = {id(tensor) for tensor in (layer.lora_A, layer.lora_B, layer.lora_R)}
    leaf, kept = torch.randn(50, 64, requires_grad=True), []
    x = leaf * 2.0
    pack = lambda tensor: kept.append(tensor) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert [tensor.numel() for tensor in kept if id(tensor) not in lasting] == [50 * 8]
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None  # bitsandbytes INT8 by itself would keep it
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize(
    "kind",
    [
        kind
        if kind in ("bitsandbytes nf4", "torchao Int8Tensor")
        else pytest.param(kind, marks=pytest.mark.slow)
        for kind in QUANTIZERS
    ],
)
def test_it_compiles_to_one_graph(kind):
    layer, _ = layers(kind)
    x, dy = torch.randn(5, 64), torch.randn(5, 96)
    expected = step(layer, x, dy)
    layer.lora_R.grad = None
    torch.compiler.reset()
    layer.compile(backend="aot_eager", fullgraph=True)
    for own, reference in zip(step(layer, x, dy), expected, strict=True):
        torch.testing.assert_close(own, reference)


@KINDS
def test_the_gradient_estimate_is_that_of_the_dequantized_model(kind):
    model = quantized(kind)
    targets = list(find_targets(model, "all-linear"))
    plain = dict(estimate_gradients(dequantized(model), batches("llama"), targets))
    own = dict(estimate_gradients(model, batches("llama"), targets))
    for name, gradient in plain.items():
        error = (own[name] - gradient).norm() / gradient.norm()
        # INT8 in eval mode also rounds its inputs to int8.
        assert error < (0.1 if kind == "bitsandbytes int8" else 1e-4), name
    assert list(find_targets(model, "all-linear")) == targets


@KINDS
def test_training_lowers_the_loss_and_leaves_the_base_alone(kind):
    model = adapt(
        quantized(kind), LoRASBConfig(r=4), batches("llama"), learning_rate=1e-4, progress=False
    ).train()
    frozen = {name: dense_weight(layer) for name, layer in adapted_layers(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(frozen) == 14
    losses = few_steps(model, torch.optim.AdamW(trained, lr=3e-3), batches("llama", 1))
    assert losses[-1] < losses[0]
    for name, layer in adapted_layers(model).items():
        assert torch.equal(dense_weight(layer), frozen[name])


@KINDS
def test_without_its_adapters_it_is_the_quantized_base(kind):
    base = quantized(kind).eval()
    batch = {"input_ids": batches("llama")[0]["input_ids"]}
    expected = base(**batch).logits
    model = adapt(base, LoRASBConfig(r=4, init="orthogonal"), progress=False)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.fill_(0.1)
    assert not torch.equal(model(**batch).logits, expected)
    with adapters_disabled(model):
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(reference_model(model)(**batch).logits, expected)


@KINDS
def test_merging_is_refused_or_dequantizes(kind):
    model = adapted(kind)
    before = logits(model)
    layer = next(iter(adapted_layers(model).values()))
    with pytest.raises(ValueError, match=rf"the weight is quantized \({kind}\); expected dequant"):
        layer.merge()
    layer.merge(safe_merge=True, dequantize=torch.float32)
    exact = dense_weight(layer).float() + layer.get_delta_weight()
    assert torch.equal(layer.weight, exact)
    layer.unmerge()
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=rf"q_proj is quantized \({kind}\); expected dequantize"):
        merge_and_unload(model)
    assert len(adapted_layers(model)) == 14
    merged = merge_and_unload(model, safe_merge=True, dequantize=torch.float32)
    assert all(quantization_of(module) is None for module in merged.modules())
    tolerance = 0.1 if kind == "bitsandbytes int8" else 1e-4
    assert (logits(merged) - before).norm() < tolerance * before.norm()


@KINDS
def test_saved_and_loaded_over_the_same_and_the_unquantized_base(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(quantized(kind), tmp_path / "adapter")), logits(model))
    on_plain = load_adapter(build("llama"), tmp_path / "adapter")
    for own, theirs in zip(
        adapted_layers(on_plain).values(), adapted_layers(model).values(), strict=True
    ):
        assert torch.equal(own.lora_R, theirs.lora_R)
    for other in (quantized(kind, seed=1), build("llama", seed=1)):
        with pytest.raises(ValueError, match="is not the one this adapter was made for"):
            load_adapter(other, tmp_path / "adapter")


def test_lora_xs_is_rebuilt_from_the_dequantized_weight(tmp_path):
    model = adapted("bitsandbytes nf4", LoRASBConfig(r=4, init="lora-xs"))
    save_adapter(model, tmp_path)
    loaded = load_adapter(quantized("bitsandbytes nf4"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="rebuilt from the weight, is not the one"):
        load_adapter(build("llama"), tmp_path)


def test_merging_on_disk_takes_the_model_it_was_quantized_from(tmp_path):
    save_adapter(adapted("bitsandbytes nf4"), tmp_path / "adapter")
    build("llama").save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    expected = merge_and_unload(load_adapter(build("llama"), tmp_path / "adapter"))
    merged = type(expected).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(expected))


@KINDS
def test_counts_are_those_of_the_model_before_quantization(kind):
    plain = describe(adapt(build("llama"), CONFIG, progress=False))
    planned, described = describe(quantized(kind), CONFIG), describe(adapted(kind))
    for own in (planned, described):
        assert (own.trainable, own.total) == (plain.trainable, plain.total)
        assert [layer.subspace for layer in own.layers] == [x.subspace for x in plain.layers]
        # From four bits per element (fp32: 32) to eight and the scales, of which these have many.
        packed, whole = (sum(x.frozen_bytes for x in d.layers) for d in (own, plain))
        assert whole / 8 < packed < whole * (0.7 if "torchao" not in kind else 0.5)


def test_layers_that_cannot_be_a_base_are_refused_by_name():
    def refused(layer, message):
        model = nn.ModuleDict({"proj": layer})
        with pytest.raises(TypeError, match=message):
            adapt(model, LoRASBConfig(r=4, init="orthogonal"), progress=False)
        assert model["proj"] is layer

    dynamic = nn.Sequential(linear())
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
    refused(dynamic[0], "proj.weight is a torchao Int8Tensor with act_quant_kwargs")
    packed = linear()
    packed.weight = nn.Parameter(
        Int4TilePackedTo4dTensor(
            torch.zeros(12, 4, 32, 4, dtype=torch.int32), torch.zeros(2, 96, 2), [1, 32], (96, 64)
        ),
        requires_grad=False,
    )
    refused(packed, "Int4TilePackedTo4dTensor, which torchao can neither dequantize nor differ")
    refused(bitsandbytes.nn.Linear4bit(64, 96), "proj is a bitsandbytes layer that is not quant")
    refused(bitsandbytes.nn.Linear8bitLt(64, 96), "with has_fp16_weights=True, whose weight")
    repacked = QUANTIZERS["bitsandbytes nf4"](linear())
    repacked.weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(
        repacked.weight.data, repacked.weight.quant_state
    )
    refused(repacked, "proj was repacked by bitsandbytes for inference on the CPU")
    for kind, name in ((LoRASBLinear, "LoRASBLinear"), (LoRALinear, "LoRALinear")):
        with pytest.raises(TypeError, match=rf"bitsandbytes int8\); .*\.nn\.Quantized{name}"):
            kind.from_linear(QUANTIZERS["bitsandbytes int8"](linear()), 8)


def test_neither_evaluation_nor_estimation_repacks_the_weight():
    model = quantized("bitsandbytes nf4")
    dict(estimate_gradients(model, batches("llama"), ["model.layers.1.mlp.up_proj"]))
    for name, module in find_targets(model, "all-linear").items():
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False), name
    layer, _ = layers("bitsandbytes nf4")
    weight = dense_weight(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    assert torch.equal(dense_weight(layer), weight)


@KINDS
def test_autocast_and_copies(kind):
    layer, _ = layers(kind)
    x = torch.randn(3, 64)
    expected, copied = layer(x), copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 2e-2 * expected.norm()
    assert torch.equal(copied(x), expected)


@KINDS
def test_lora_trains_over_it(kind):
    """A and B trained, gradients and updates in fp32."""
    base = linear(torch.bfloat16)
    layer = QuantizedLoRALinear.from_linear(QUANTIZERS[kind](base), 8, scaling=0.5)
    plain = copy.deepcopy(base)
    plain.weight.data = dense_weight(layer).to(torch.bfloat16)
    twin = LoRALinear.from_linear(plain, 8, scaling=0.5)
    lora_B = torch.randn(96, 8)
    for adapter in (layer, twin):
        adapter.set_adapter(layer.lora_A.detach().clone(), None, lora_B)
    x, dy = torch.randn(5, 64).bfloat16(), torch.randn(5, 96).bfloat16()
    results = []
    for adapter in (layer, twin):
        leaf = x.clone().requires_grad_()
        adapter(leaf).backward(dy)
        results.append((leaf.grad, adapter.lora_A.grad, adapter.lora_B.grad))
    for own, expected in zip(*results, strict=True):
        assert own.dtype == expected.dtype
        torch.testing.assert_close(own, expected)


def test_a_lora_model_is_saved_and_merged(tmp_path):
    config = LoRASBConfig(r=4, init="lora-one", lora_alpha=8)
    model = quantized("bitsandbytes nf4")
    adapt(model, config, batches("llama"), progress=False)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(quantized("bitsandbytes nf4"), tmp_path)), logits(model))
    before = logits(model)
    torch.testing.assert_close(logits(merge_and_unload(model, dequantize=torch.float32)), before)


def test_a_bias_beside_a_frozen_layer_is_refused():
    layer, _ = layers("bitsandbytes nf4")
    operands = (layer.frozen_weight(), layer.lora_A, layer.lora_R, layer.lora_B)
    with pytest.raises(ValueError, match="bias is given with a FrozenLayer; expected None"):
        lorasb_linear(torch.randn(3, 64), *operands, torch.zeros(96))
    with pytest.raises(ValueError, match=r"x has shape \(3, 63\); expected a last dimension of 64"):
        lorasb_linear(torch.randn(3, 63), *operands)


def test_the_plan_of_a_quantized_layer_is_explained():
    layer, _ = layers("bitsandbytes nf4", torch.bfloat16)
    assert str(explain(layer, arch="sm_86")) == str(explain((96, 64, 8), arch="sm_86"))


def test_siblings_are_computed_together():
    config = LoRASBConfig(r=4, init="orthogonal", scaling=0.5, share_inputs=True)
    model, apart = adapted("bitsandbytes nf4", config), adapted("bitsandbytes nf4")
    assert sum(layer.shared_input is not None for layer in adapted_layers(model).values()) == 10
    for shared in (model, apart):
        shared(**batches("llama")[0]).loss.backward()
    pairs = zip(adapted_layers(model).values(), adapted_layers(apart).values(), strict=True)
    for own, expected in pairs:
        torch.testing.assert_close(own.lora_R.grad, expected.lora_R.grad)
