"""Liger kernels on an adapted model: Liger's modules call the adapted layers.

Liger's Triton kernels need a GPU, so its SwiGLU product is computed by PyTorch here; Liger's
kernels together with this library's on a GPU are not tested.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

liger = pytest.importorskip(
    "liger_kernel.transformers", reason="Liger-Kernel is in the extra [full]"
)


def with_liger(model):
    liger.apply_liger_kernel_to_llama(
        rope=False, rms_norm=False, fused_linear_cross_entropy=False, swiglu=True, model=model
    )
    return model


def adapted(model):
    adapt(model, LoRASBConfig(r=4, init="orthogonal"), progress=False)
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.normal_(std=0.1)
    return model


def step(model):
    loss = model(**batches("llama")[0]).loss
    loss.backward()
    return loss.detach(), [layer.lora_R.grad for layer in adapted_layers(model).values()]


@pytest.mark.parametrize("first", ["adapted", "patched"])
def test_ligers_mlp_calls_the_adapted_layers(first, monkeypatch):
    expected = step(adapted(build("llama")))
    # Liger also replaces the class for later models; this restores it.
    monkeypatch.setattr(modeling_llama, "LlamaMLP", modeling_llama.LlamaMLP)
    products = []

    def silu_mul(gate, up, *_):
        products.append(gate.shape)
        return F.silu(gate) * up

    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction.apply", silu_mul)
    model = build("llama")
    model = with_liger(adapted(model)) if first == "adapted" else adapted(with_liger(model))
    loss, gradients = step(model)
    assert len(products) == len(model.model.layers)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradients, expected[1])
