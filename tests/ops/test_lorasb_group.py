"""`lorasb_group`: several layers on one input are what they are alone."""

import pytest
import torch

from lorasb_kernels.functional import lorasb_group, lorasb_linear


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    x, lists = operands()

    def function(x, *cores):
        torch.manual_seed(0)
        return lorasb_group(x, **{**lists, "lora_Rs": cores}, dropout=dropout)

    assert torch.autograd.gradcheck(function, (x, *lists["lora_Rs"]))


def test_an_unused_output_has_no_influence():
    x, lists = operands()
    ys = lorasb_group(x, **lists)
    leaves = [x, lists["lora_Rs"][0]]
    gradient, core = torch.autograd.grad(ys[1].sum(), leaves, allow_unused=True)
    layer = [values[1] for values in lists.values()]
    (expected,) = torch.autograd.grad(lorasb_linear(x, *layer).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert core is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights is empty"),
        ({"lora_As": []}, "lora_As has 0 items; expected 3"),
        ({"ranks": True}, r"lora_As have ranks \[3, 4\]; expected one rank"),
    ],
)
def test_bad_lists_are_named(change, message):
    x, lists = operands()
    if "ranks" in change:
        lists["lora_Rs"][0] = torch.ones(3, 3).double()
        lists["lora_As"][0] = lists["lora_As"][0][:3]
        lists["lora_Bs"][0] = lists["lora_Bs"][0][:, :3]
    lists |= {name: value for name, value in change.items() if name in lists}
    with pytest.raises(ValueError, match=message):
        lorasb_group(x, **lists)


def test_dropout_is_that_of_separate_layers():
    x, lists = operands()
    outcomes = []
    for together in (True, False):
        torch.manual_seed(0)
        if together:
            ys = lorasb_group(x, **lists, dropout=0.5)
        else:
            layers = zip(*lists.values(), strict=True)
            ys = [lorasb_linear(x, *layer, dropout=0.5) for layer in layers]
        outcomes.append([*ys, torch.rand(1)])
    for found, expected in zip(*outcomes, strict=True):
        assert torch.equal(found, expected)


def test_any_sum_of_ranks():
    x, lists = operands(n=210, r=200)
    lists["weights"] = [torch.ones(200, 210).double() for _ in range(3)]
    lists["lora_Bs"] = [torch.ones(200, 200).double() for _ in range(3)]
    lists["biases"] = [None] * 3
    alone = [lorasb_linear(x, *layer) for layer in zip(*lists.values(), strict=True)]
    torch.testing.assert_close(lorasb_group(x, **lists), tuple(alone))


def test_outputs_are_walked_one_by_one():
    x, lists = operands()
    gradients = []
    for ys in (
        lorasb_group(x, **lists),
        [lorasb_linear(x, *layer) for layer in zip(*lists.values(), strict=True)],
    ):
        gradients.append([torch.autograd.grad(y.sin().sum(), x)[0] for y in ys])
    torch.testing.assert_close(*gradients)


def test_nothing_is_left_in_a_graph_that_is_walked_for_the_cores_alone():
    """The common input's node, which such passes never reach, must not collect what they leave."""
    x, lists = operands()
    ys = lorasb_group(x, **lists)
    loss = sum(y.sin().sum() for y in ys)
    for _ in range(3):
        torch.autograd.grad(loss, lists["lora_Rs"], retain_graph=True)
    *_, link = ys[0].grad_fn.next_functions[0][0].settings
    assert link.left == {}
    torch.autograd.grad(loss, [x], retain_graph=True)
    assert link.left == {}
