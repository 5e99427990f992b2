"""Siblings under any order of calls and any change between them: what separate layers compute.

Each test has two copies of one parent module, its layers grouped in one of them alone, does the
same to both and compares. Computed by the reference, outputs have the same bits; gradients of
the input are summed in another order.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasb_kernels.nn import LoRALinear, LoRASBLinear, share_inputs, shared_input

NAMES = ("q_proj", "k_proj", "v_proj")


class Parent(nn.Module):
    """Three siblings; `forward` runs whatever it is given, as the body of an attention layer."""

    def __init__(self, kind=LoRASBLinear, r=4, n=24, **options):
        super().__init__()
        torch.manual_seed(0)
        for name, m in zip(NAMES, (16, 8, 20), strict=True):
            layer = kind(n, max(m, r), r, scaling=0.5, **options)
            with torch.no_grad():
                for factor in layer.parameters():
                    factor.normal_(std=0.2)
            setattr(self, name, layer)

    def forward(self, body):
        return body(self)


def new_parents(**options):
    """The same parent twice, the second with grouped layers that have not been called."""
    separate = Parent(**options)
    grouped = copy.deepcopy(separate)
    assert len(share_inputs(grouped)) == 1
    return separate, grouped


def parents(**options):
    """As `new_parents`, after a call in each mode, in which values are compared."""
    separate, grouped = new_parents(**options)
    x = torch.zeros(1, grouped.q_proj.in_features)
    for training in (False, True):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                grouped.train(training)(lambda p: [getattr(p, name)(x) for name in NAMES])
    return separate, grouped


def inputs(rows=5, n=24):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(1))


def same(body, inside=True, **options):
    """Both parents return the same bits from `body(parent)`, run in a call of theirs or not."""
    outcomes = [p(body) if inside else body(p) for p in parents(**options)]
    assert len(outcomes[0]) == len(outcomes[1]) > 0
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


inside_and_outside = pytest.mark.parametrize("inside", [True, False])


@inside_and_outside
@pytest.mark.parametrize("order", ["kqv", "vkq", "qqk", "qvqk"])
def test_any_order(order, inside):
    x = inputs()
    same(lambda p: [getattr(p, f"{name}_proj")(x) for name in order], inside)


def test_a_fixed_input_over_several_steps():
    """Two calls in another order each, the cores changed between them."""
    x = inputs()

    def body(parent):
        outputs = [parent.k_proj(x), parent.q_proj(x)]
        with torch.no_grad():
            for name in NAMES:
                getattr(parent, name).lora_R.add_(1)
        return [*outputs, parent.k_proj(x), parent.q_proj(x), parent.v_proj(x)]

    same(body)
    same(body, inside=False)


def set_core(layer):
    with torch.no_grad():
        layer.lora_R.add_(1)


def replace_core(layer):
    layer.lora_R = nn.Parameter(layer.lora_R.detach() + 1)


def replace_core_data(layer):
    layer.lora_R.data = layer.lora_R.detach() + 1


def set_scaling(layer):
    layer.scaling = 2.0


def set_factors(layer):
    layer.reset_adapter(torch.Generator().manual_seed(5))
    set_core(layer)


def merge(layer):
    layer.merge()


def set_weight(layer):
    layer.weight.data.add_(1)


def set_bias(layer):
    layer.bias.data.add_(1)


CHANGES = (
    set_core,
    replace_core,
    replace_core_data,
    set_scaling,
    set_factors,
    merge,
    set_weight,
    set_bias,
)


@inside_and_outside
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_sibling_changed_between_two_calls(change, inside):
    x = inputs()

    def body(parent):
        q = parent.q_proj(x)
        change(parent.k_proj)
        return [q, parent.k_proj(x), parent.v_proj(x)]

    same(body, inside)


def test_data_written_between_two_calls():
    """Outside a call of the parent not even a write that autograd does not see goes unnoticed."""

    def body(parent):
        x = inputs()
        q = parent.q_proj(x)
        x.data.add_(1)
        parent.k_proj.lora_R.data.add_(1)
        return [q, parent.k_proj(x), parent.v_proj(x)]

    same(body, inside=False)


@inside_and_outside
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_input_changed_in_place(mode, inside):
    def body(parent):
        with mode():
            x = inputs() + 0
            q = parent.q_proj(x)
            x.add_(1)
            k = parent.k_proj(x)
            x.mul_(2)
            return [q, k, parent.v_proj(x)]

    same(body, inside)


@inside_and_outside
def test_the_input_given_other_data(inside):
    def body(parent):
        x = inputs()
        q = parent.q_proj(x)
        x.data = inputs() + 1
        k = parent.k_proj(x)
        x.t_()
        x.t_()
        return [q, k, parent.v_proj(x)]

    same(body, inside)


@inside_and_outside
def test_autocast_changed_between_two_calls(inside):
    x = inputs()

    def body(parent):
        q = parent.q_proj(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = parent.k_proj(x)
        return [q, k, parent.v_proj(x)]

    same(body, inside)


@inside_and_outside
@pytest.mark.parametrize("training", ["ttt", "eee", "tet", "ete"])
def test_training_and_dropout(training, inside):
    """The masks are those of separate layers, whichever of the layers is trained."""
    x = inputs()

    def body(parent):
        torch.manual_seed(7)
        outputs = []
        for name, mode in zip(NAMES, training, strict=True):
            layer = getattr(parent, name).train(mode == "t")
            outputs.append(layer(x))
        return [*outputs, torch.rand(1)]

    same(body, inside, dropout=0.5)


@inside_and_outside
@pytest.mark.parametrize("kind", [LoRASBLinear, LoRALinear])
def test_separate_backward_passes(kind, inside):
    def body(parent):
        x = inputs().requires_grad_()
        ys = [getattr(parent, name)(x) for name in NAMES]
        gradients = []
        for y in ys:
            y.sin().sum().backward()
            gradients.append(x.grad.clone())
        gradients += [p.grad for p in parent.parameters() if p.grad is not None]
        return gradients

    close(body, inside, kind=kind)


def close(body, inside=True, **options):
    """As `same`, up to the order of a sum of gradients in fp32."""
    outcomes = [p(body) if inside else body(p) for p in parents(**options)]
    assert len(outcomes[0]) == len(outcomes[1]) > 0
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@inside_and_outside
@pytest.mark.parametrize("kind", [LoRASBLinear, LoRALinear])
def test_one_backward_pass(kind, inside):
    def body(parent):
        x = inputs().requires_grad_()
        # v is left out: its factors have no gradient, and nothing of it reaches x.
        loss = parent.q_proj(x).sin().sum() + parent.k_proj(x).cos().sum()
        parent.v_proj(x)
        loss.backward()
        assert all(p.grad is None for p in parent.v_proj.parameters())
        return [x.grad, *(p.grad for p in parent.parameters() if p.grad is not None)]

    close(body, inside, kind=kind)


@inside_and_outside
def test_a_graph_walked_twice_and_in_parts(inside):
    def body(parent):
        x = inputs().requires_grad_()
        ys = [getattr(parent, name)(x) for name in NAMES]
        loss = sum(y.sin().sum() for y in ys)
        core = parent.k_proj.lora_R
        grad = torch.autograd.grad
        return [
            *grad(loss, [core], retain_graph=True),
            *grad(loss, [x, core], retain_graph=True),
            *grad(ys[2].sum(), [x], retain_graph=True),
            *grad(loss, [x]),
        ]

    close(body, inside)


@inside_and_outside
def test_a_freed_graph_is_refused(inside):
    """What separate layers refuse is refused: a second pass over one layer's freed graph."""
    for parent in parents():

        def body(parent):
            x = inputs().requires_grad_()
            return parent.q_proj(x), parent.k_proj(x), x

        q, k, x = parent(body) if inside else body(parent)
        q.sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            q.sum().backward()
        k.sum().backward()
        assert x.grad is not None


@inside_and_outside
def test_a_core_changed_before_the_backward_pass_is_refused(inside):
    for parent in parents():

        def body(parent):
            x = inputs().requires_grad_()
            return parent.q_proj(x), parent.k_proj(x)

        q, k = parent(body) if inside else body(parent)
        set_core(parent.k_proj)
        q.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            k.sum().backward()


@inside_and_outside
@pytest.mark.parametrize("graded", [("q",), ("k", "v"), ("k",)])
def test_gradients_on_and_off_between_siblings(graded, inside):
    def body(parent):
        x = inputs().requires_grad_()
        outputs = []
        for name in "qkv":
            with torch.set_grad_enabled(name in graded):
                outputs.append(getattr(parent, f"{name}_proj")(x))
        assert [y.requires_grad for y in outputs] == [name in graded for name in "qkv"]
        loss = sum(y.sin().sum() for y in outputs if y.requires_grad)
        return [*outputs, *torch.autograd.grad(loss, [x])]

    close(body, inside)


@inside_and_outside
def test_inference_mode_left_between_siblings(inside):
    """What was computed in inference mode cannot be saved for backward."""

    def body(parent):
        x = inputs().requires_grad_()
        with torch.inference_mode():
            parent.q_proj(x)
        k, v = parent.k_proj(x), parent.v_proj(x)
        return [k, v, *torch.autograd.grad(k.sum() + v.sum(), [x, parent.k_proj.lora_R])]

    close(body, inside)


@inside_and_outside
def test_an_input_cut_off_from_its_graph_between_siblings(inside):
    def body(parent):
        leaf = inputs().requires_grad_()
        x = leaf * 1
        q = parent.q_proj(x)
        x.detach_().requires_grad_()
        k = parent.k_proj(x)
        (q.sum() + k.sum()).backward()
        return [q, k, leaf.grad, x.grad]

    close(body, inside)


@inside_and_outside
def test_an_input_detached_between_siblings(inside):
    def body(parent):
        leaf = inputs().requires_grad_()
        x = leaf * 1
        q = parent.q_proj(x)
        x.detach_()
        k = parent.k_proj(x)
        x.requires_grad_()
        v = parent.v_proj(x)
        (q.sum() + k.sum() + v.sum()).backward()
        return [q, k, v, leaf.grad, x.grad]

    close(body, inside)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("what", ["parent", "layer"])
def test_checkpointing(what, use_reentrant):
    def body(parent):
        x = inputs().requires_grad_()

        def layers(x):
            return parent(lambda p: sum(getattr(p, name)(x).sin().sum() for name in NAMES))

        def one_by_one(x):
            return parent(
                lambda p: sum(
                    checkpoint(getattr(p, name), x, use_reentrant=use_reentrant).sin().sum()
                    for name in NAMES
                )
            )

        if what == "parent":
            loss = checkpoint(layers, x, use_reentrant=use_reentrant)
        else:
            loss = one_by_one(x)
        loss.backward()
        return [loss, x.grad, *(p.grad for p in parent.parameters() if p.grad is not None)]

    close(body, inside=False)


def test_a_rank_whose_sum_is_above_512():
    x = inputs(n=210)
    same(lambda p: [getattr(p, name)(x) for name in NAMES], r=200, n=210)


def add_to_input(layer, x):
    x.data.add_(1)


def add_through_numpy(layer, x):
    x.detach().numpy()[0, 0] += 1


def add_to_core(layer, x):
    layer.lora_R.data[0, 0] += 1


def add_to_a(layer, x):
    layer.lora_A.data[0, 0] += 1


@pytest.mark.parametrize("write", [add_to_input, add_through_numpy, add_to_core, add_to_a])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_hidden_write_between_siblings_ends_the_group(write, training, gradients):
    """Also in the first call of another mode, when there was none in the others."""

    def body(parent):
        x = inputs()
        outputs = [parent.q_proj(x)]
        if (parent.training, torch.is_grad_enabled()) == (training, gradients):
            write(parent.k_proj, x)
        return [*outputs, parent.k_proj(x), parent.v_proj(x)]

    separate, grouped = new_parents()
    model = nn.ModuleDict({"attention": grouped})
    share_inputs(model)
    modes = [
        (t, g) for t in (True, False) for g in (True, False) if (t, g) != (training, gradients)
    ]
    messages = []
    for mode in (*modes, (training, gradients), (training, gradients)):
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(mode[1]):
            warnings.simplefilter("always")
            outcomes = [parent.train(mode[0])(body) for parent in (separate, grouped)]
        for expected, found in zip(*outcomes, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        messages += [str(warning.message) for warning in caught]
        assert len(messages) == (mode == (training, gradients))
        assert (grouped.q_proj.shared_input is None) == (mode == (training, gradients))
    assert messages[0].startswith("attention writes to their input, A or R between two siblings")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_special_values_are_no_hidden_write(value, recwarn):
    _, grouped = new_parents()
    x = inputs()
    x[0] = value
    grouped(lambda p: [getattr(p, name)(x) for name in NAMES])
    assert grouped.q_proj.shared_input is not None
    assert not list(recwarn)


def test_values_are_compared_in_the_first_call_of_a_mode(monkeypatch):
    """None is read in later ones, which on a GPU would wait for it."""
    compared = []
    monkeypatch.setattr(shared_input, "_equal", lambda *_: compared.append(1) or True)
    _, grouped = new_parents()
    x = inputs()
    for _ in range(3):
        grouped(lambda p: [getattr(p, name)(x) for name in NAMES])
    assert len(compared) == 2
    with torch.no_grad():
        grouped(lambda p: [getattr(p, name)(x) for name in NAMES])
    assert len(compared) == 4


def test_meta_tensors_have_no_values_to_compare():
    _, grouped = new_parents()
    x = inputs().to("meta")
    shapes = grouped.to("meta")(lambda p: [getattr(p, name)(x).shape for name in NAMES])
    assert shapes == [(5, 16), (5, 8), (5, 20)]


def test_nothing_is_held_after_a_call():
    """Neither the input nor anything computed from it lives on when the parent has returned."""
    import gc
    import weakref

    _, grouped = parents()

    def body(parent):
        x = inputs()
        parent.q_proj(x)  # k and v are never asked
        return [weakref.ref(x)]

    (reference,) = grouped(body)
    gc.collect()
    assert reference() is None

    def failing(parent):
        x = inputs()
        references.append(weakref.ref(x))
        parent.q_proj(x)
        raise ValueError("on purpose")

    references = []
    with pytest.raises(ValueError, match="on purpose"):
        grouped(failing)
    gc.collect()
    assert references[0]() is None
