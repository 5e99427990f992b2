"""Sibling layers computed together: the same results, one pass over the input."""

import copy

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.functional import lorasb_group, lorasb_linear
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build


def operands(count=3, n=24, r=4, rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = [16, 8, 20][:count]
    return normal(rows, n).requires_grad_(), {
        "weights": [normal(m, n) for m in sizes],
        "lora_As": [normal(r, n) for _ in sizes],
        "lora_Rs": [normal(r, r).requires_grad_() for _ in sizes],
        "lora_Bs": [normal(m, r) for m in sizes],
        "biases": [None if i == 1 else normal(m) for i, m in enumerate(sizes)],
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_group_equals_its_layers(count):
    x, lists = operands(count)
    ys = lorasb_group(x, **lists, scaling=0.5)
    dys = [torch.randn_like(y) for y in ys]
    gradients = torch.autograd.grad(ys, [x, *lists["lora_Rs"]], dys)
    separate = [
        lorasb_linear(x, *layer, scaling=0.5) for layer in zip(*lists.values(), strict=True)
    ]
    expected = torch.autograd.grad(separate, [x, *lists["lora_Rs"]], dys)
    torch.testing.assert_close(ys, tuple(separate))
    torch.testing.assert_close(gradients, expected)


def test_gradcheck():
    x, lists = operands()

    def function(x, *cores):
        torch.manual_seed(0)
        return lorasb_group(x, **{**lists, "lora_Rs": cores}, dropout=0.3)

    assert torch.autograd.gradcheck(function, (x, *lists["lora_Rs"]))


def test_an_unused_output_has_no_influence():
    x, lists = operands()
    ys = lorasb_group(x, **lists)
    gradient, core = torch.autograd.grad(ys[1].sum(), [x, lists["lora_Rs"][0]])
    layer = [values[1] for values in lists.values()]
    (expected,) = torch.autograd.grad(lorasb_linear(x, *layer).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert not core.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights is empty"),
        ({"lora_As": []}, "lora_As has 0 items; expected 3"),
        ({"stack": True}, "expected at most 512 ranks in all"),
        ({"ranks": True}, r"lora_As have ranks \[3, 4\]; expected one rank"),
    ],
)
def test_bad_lists_are_named(change, message):
    x, lists = operands(r=200 if "stack" in change else 4)
    if "ranks" in change:
        lists["lora_Rs"][0] = torch.ones(3, 3).double()
        lists["lora_As"][0] = lists["lora_As"][0][:3]
        lists["lora_Bs"][0] = lists["lora_Bs"][0][:, :3]
    lists |= {name: value for name, value in change.items() if name in lists}
    with pytest.raises(ValueError, match=message):
        lorasb_group(x, **lists)


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
    assert all(group._pending is None for group in groups.values())


def count_shrinks(monkeypatch):
    from lorasb_kernels.ops.lorasb_linear import autograd

    calls, shrink = [], autograd.shrink

    def counting(*arguments):
        calls.append(arguments[1].shape[0])
        return shrink(*arguments)

    monkeypatch.setattr(autograd, "shrink", counting)
    return calls


def test_the_input_is_shrunk_once_for_all_siblings(monkeypatch):
    _, grouped = grouped_and_not("llama")
    calls = count_shrinks(monkeypatch)
    grouped(**batches("llama")[0])
    assert calls == [12, 4, 8, 4] * 2  # q k v, o, gate up, down


def test_another_input_is_computed_alone(monkeypatch):
    _, grouped = grouped_and_not("llama")
    attention = grouped.model.layers[0].self_attn
    x, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    attention.q_proj(x)
    layer = attention.k_proj
    expected = lorasb_linear(
        other, layer.weight, layer.lora_A, layer.lora_R, layer.lora_B, layer.bias
    )
    torch.testing.assert_close(layer(other), expected)
    assert attention.q_proj.shared_input._pending is None
    changed = x.clone()
    attention.q_proj(changed)
    changed.add_(1)
    expected = lorasb_linear(
        changed, layer.weight, layer.lora_A, layer.lora_R, layer.lora_B, layer.bias
    )
    torch.testing.assert_close(layer(changed), expected)


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
