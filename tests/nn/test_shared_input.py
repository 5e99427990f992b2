"""Sibling layers of real models computed together: the same results, one pass over the input."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt, merge_and_unload
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build


def grouped_and_not(architecture, **fields):
    models = []
    for share_inputs in (False, True):
        config = LoRASBConfig(4, init="orthogonal", share_inputs=share_inputs, **fields)
        model = adapt(build(architecture), config, progress=False)
        for i, layer in enumerate(adapted_layers(model).values()):
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                layer.lora_R.copy_(torch.randn(4, 4, generator=generator) * 0.3)
        models.append(model)
    return models


EXPECTED_GROUPS = {
    "llama": 4,  # two blocks of (q, k, v) and (gate, up)
    "gemma2": 4,
    "qwen3": 4,
    "phi": 2,
    "phi3": 0,  # fused projections
    "gpt_neox": 0,
    "roberta": 2,
    "t5": 4,  # self-attention of encoder and decoder; not the cross-attention
}


@pytest.mark.parametrize("architecture", sorted(EXPECTED_GROUPS))
def test_models_compute_the_same_with_groups(architecture):
    plain, grouped = grouped_and_not(architecture)
    groups = {
        id(layer.shared_input): layer.shared_input
        for layer in adapted_layers(grouped).values()
        if layer.shared_input is not None
    }
    assert len(groups) == EXPECTED_GROUPS[architecture]
    batch = batches(architecture)[0]
    for model in (plain, grouped):
        model(**batch).loss.backward()
    torch.testing.assert_close(grouped(**batch).logits, plain(**batch).logits)
    for name, layer in adapted_layers(plain).items():
        ours = grouped.get_submodule(name).lora_R.grad
        torch.testing.assert_close(ours, layer.lora_R.grad, rtol=1e-4, atol=1e-6)
    assert all(group._thread.call is None for group in groups.values())


def count_projections(monkeypatch):
    """Appends the number of layers of each projection to the list returned."""
    from lorasb_kernels.ops.lorasb_linear import api, autograd, siblings

    calls, forward, shrink_group = [], autograd.forward, siblings.shrink_group

    def counting(*arguments):
        if len(arguments) == 10 or arguments[10] is None:  # nothing projected before
            calls.append(1)
        return forward(*arguments)

    def counting_group(x, lora_As, *arguments):
        calls.append(len(lora_As))
        return shrink_group(x, lora_As, *arguments)

    for module in (api, autograd):  # without an autograd node, and in one
        monkeypatch.setattr(module, "forward", counting)
    monkeypatch.setattr(siblings, "shrink_group", counting_group)
    return calls


def test_the_input_is_projected_once_for_all_siblings(monkeypatch):
    _, grouped = grouped_and_not("llama")
    calls = count_projections(monkeypatch)
    batch = batches("llama")[0]
    grouped(**batch).loss.backward()
    with torch.no_grad():
        grouped(**batch)
    assert calls == [3, 1, 2, 1] * 4  # q k v, o, gate up, down


def test_layers_called_outside_their_parent_compute_for_themselves(monkeypatch):
    _, grouped = grouped_and_not("llama")
    calls = count_projections(monkeypatch)
    attention = grouped.model.layers[0].self_attn
    x = torch.randn(2, 3, 32)
    attention.q_proj(x), attention.k_proj(x)
    assert calls == [1, 1]


def test_a_sibling_that_reads_something_else_leaves_the_group(monkeypatch):
    """As under cross-attention: what is projected in vain is so once."""
    _, grouped = grouped_and_not("llama")
    attention = grouped.model.layers[0].self_attn
    attention.forward = lambda x, other: [
        attention.q_proj(x),
        attention.k_proj(other),
        attention.v_proj(other),
    ]
    calls = count_projections(monkeypatch)
    x, other = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    for _ in range(3):
        attention(x, other)
    assert calls == [3, 2, 1, 1, 1, 1, 1, 1]


def test_a_sibling_that_is_not_called_leaves_the_group(monkeypatch):
    _, grouped = grouped_and_not("llama")
    attention = grouped.model.layers[0].self_attn
    attention.forward = lambda x: [attention.q_proj(x), attention.v_proj(x)]
    calls = count_projections(monkeypatch)
    x = torch.randn(2, 3, 32)
    for _ in range(3):
        attention(x)
    assert calls == [3, 2, 2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    plain, grouped = grouped_and_not("llama")
    batch = batches("llama")[0]
    plain(**batch).loss.backward()
    grouped.train()
    grouped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    grouped.enable_input_require_grads()
    grouped(**batch).loss.backward()
    for name, layer in adapted_layers(plain).items():
        ours = grouped.get_submodule(name).lora_R.grad
        torch.testing.assert_close(ours, layer.lora_R.grad, rtol=1e-4, atol=1e-6)


def test_training_merging_copying_and_generating():
    plain, grouped = grouped_and_not("llama", dropout=0.2)
    twin = copy.deepcopy(grouped)
    assert (
        twin.model.layers[0].mlp.up_proj.shared_input.layers[1] is twin.model.layers[0].mlp.up_proj
    )
    batch = batches("llama")[0]
    prompt = batch["input_ids"][:, :4]
    with torch.inference_mode():
        tokens = grouped.generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, plain.generate(prompt, max_new_tokens=5, do_sample=False))
    expected = grouped(**batch).logits
    grouped.model.layers[0].self_attn.k_proj.merge()
    torch.testing.assert_close(grouped(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin(**batch).logits, expected)


def test_merging_for_good_leaves_nothing_behind():
    _, grouped = grouped_and_not("llama")
    batch = batches("llama")[0]
    expected = grouped(**batch).logits
    merge_and_unload(grouped)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in grouped.modules())
    torch.testing.assert_close(grouped(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_shares_its_own_inputs(monkeypatch):
    _, grouped = grouped_and_not("llama")
    expected = grouped(**batches("llama")[0]).logits
    twin = copy.deepcopy(grouped)
    for layer in adapted_layers(grouped).values():
        torch.nn.init.ones_(layer.lora_R)
    calls = count_projections(monkeypatch)
    torch.testing.assert_close(twin(**batches("llama")[0]).logits, expected, rtol=0, atol=0)
    assert calls == [3, 1, 2, 1] * 2
    twin.model.layers[0].mlp.up_proj.shared_input.detach()
    assert not twin.model.layers[0].mlp._forward_hooks
    assert grouped.model.layers[0].mlp._forward_hooks


def test_a_new_subspace_is_noticed():
    plain, grouped = grouped_and_not("llama")
    batch = batches("llama")[0]
    grouped(**batch)
    for model in (plain, grouped):
        for i, layer in enumerate(adapted_layers(model).values()):
            layer.reset_adapter(torch.Generator().manual_seed(i))
            with torch.no_grad():
                layer.lora_R.fill_(0.1)
    torch.testing.assert_close(grouped(**batch).logits, plain(**batch).logits)


def test_compiles_without_graph_breaks():
    plain, grouped = grouped_and_not("llama")
    mlp, reference = grouped.model.layers[0].mlp, plain.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(mlp, fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x))
    compiled(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(mlp.up_proj.lora_R.grad, reference.up_proj.lora_R.grad)
