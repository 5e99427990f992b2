"""`adapters_disabled` and `reference_model`: the base, bit for bit, out of the adapted model."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, adapters_disabled, reference_model
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

ARCHITECTURES = ("llama", "gpt2", "roberta")


def adapted(architecture, **options):
    """A tiny model with adapters that change it, and a copy from before."""
    model = build(architecture).eval()
    base = copy.deepcopy(model)
    adapt(model, LoRASBConfig(r=4, init="orthogonal", **options), progress=False)
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_R.data.normal_(std=0.1)
    return model, base


def logits(model, architecture):
    return model(**batches(architecture)[0]).logits


@pytest.mark.parametrize("share_inputs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabled_is_the_base(architecture, share_inputs):
    model, base = adapted(architecture, share_inputs=share_inputs)
    before = logits(model, architecture)
    expected = logits(base, architecture)
    with adapters_disabled(model):
        assert torch.equal(logits(model, architecture), expected)
    assert torch.equal(logits(model, architecture), before)
    assert not torch.equal(before, expected)


def test_it_keeps_siblings_together_and_training_unchanged():
    model, _ = adapted("llama", share_inputs=True)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batches("llama")[0]).loss.backward()
        layers = adapted_layers(model).values()
        gradients.append([layer.lora_R.grad.clone() for layer in layers])
        with adapters_disabled(model), torch.no_grad():
            logits(model, "llama")
    assert all(map(torch.equal, *gradients))
    assert {len(layer.shared_input.layers) for layer in layers if layer.shared_input} == {2, 3}


def test_it_ends_with_an_error_and_can_be_nested():
    model, base = adapted("llama")
    expected = logits(base, "llama")

    def fail():
        with adapters_disabled(model):
            with adapters_disabled(model):
                pass
            assert torch.equal(logits(model, "llama"), expected)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not torch.equal(logits(model, "llama"), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_the_base_over_the_same_tensors(architecture):
    model, base = adapted(architecture, share_inputs=True)
    reference = reference_model(model)
    assert torch.equal(logits(reference, architecture), logits(base, architecture))
    assert not adapted_layers(reference)
    assert not hasattr(reference, "lorasb_config")
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    own = [n for n, p in reference.named_parameters() if p.data_ptr() not in frozen]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert set(own) == trained
    assert not any(p.requires_grad for p in reference.parameters())


def test_training_moves_the_model_and_not_its_reference():
    model, base = adapted("llama", share_inputs=True)
    reference = reference_model(model)
    expected, before = logits(base, "llama"), logits(model, "llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()(**batches("llama")[0]).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert torch.equal(logits(reference, "llama"), expected)
    assert not torch.equal(logits(model.eval(), "llama"), before)


def test_the_reference_saves_as_a_plain_model(tmp_path):
    model, base = adapted("llama")
    reference_model(model).save_pretrained(tmp_path)
    assert torch.equal(logits(type(base).from_pretrained(tmp_path), "llama"), logits(base, "llama"))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/lorasb_config.json").exists()


@pytest.mark.parametrize("function", [reference_model, lambda m: adapters_disabled(m).__enter__()])
def test_refused(function):
    with pytest.raises(ValueError, match="no adapter"):
        function(build("llama"))
    model, _ = adapted("llama")
    name, layer = next(iter(adapted_layers(model).items()))
    layer.merge()
    with pytest.raises(ValueError, match=f"1 of .* merged, such as {name}"):
        function(model)
