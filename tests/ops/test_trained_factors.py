"""`lorasb_linear` with A, R and B each trained, frozen, or (R) absent."""

import itertools

import pytest
import torch

from lorasb_kernels.functional import lorasb_group, lorasb_linear
from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.lorasb_linear.checks import check_backend
from tests.contract import assert_within_contract
from tests.ops.test_lorasb_linear import operands

FACTORS = ("lora_A", "lora_R", "lora_B")
TRAINED = [
    frozenset(names) for count in range(4) for names in itertools.combinations(FACTORS, count)
]


def factors(trained, absent_core=False, **options):
    """Operands in which exactly `trained` (and x) require grad."""
    arguments = operands(**options)
    for name in FACTORS:
        arguments[name] = arguments[name].detach().requires_grad_(name in trained)
    if absent_core:
        arguments["lora_R"] = None
    return arguments


def formula(x, weight, lora_A, lora_R, lora_B, bias, scaling=1.0):
    """The layer in plain tensor algebra, differentiated by torch."""
    delta = lora_B @ lora_A if lora_R is None else lora_B @ lora_R @ lora_A
    return x @ (weight + scaling * delta).T + bias


def gradients(arguments):
    return {
        name: tensor.grad
        for name, tensor in arguments.items()
        if tensor is not None and tensor.requires_grad
    }


@pytest.mark.parametrize("absent_core", [False, True])
@pytest.mark.parametrize("trained", TRAINED, ids=lambda names: "+".join(sorted(names)) or "none")
def test_gradients_of_every_combination(trained, absent_core):
    ours = factors(trained, absent_core)
    plain = factors(trained, absent_core)
    y, expected = lorasb_linear(**ours, scaling=0.5), formula(**plain, scaling=0.5)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert gradients(ours).keys() == gradients(plain).keys()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("absent_core", [False, True])
def test_gradcheck(absent_core, dropout):
    arguments = factors(FACTORS, absent_core, M=5, n=9, m=6, r=3)
    names = [name for name, t in arguments.items() if t is not None and t.requires_grad]

    def function(*values):
        torch.manual_seed(3)
        changed = dict(zip(names, values, strict=True))
        return lorasb_linear(**{**arguments, **changed}, scaling=0.7, dropout=dropout)

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


@pytest.mark.parametrize(
    ("trained", "absent_core", "kept"),
    [
        (("lora_R",), False, {"h"}),
        (("lora_A", "lora_B"), True, {"x", "p"}),
        (("lora_A",), True, {"x"}),
        (("lora_B",), True, {"p"}),
        (("lora_A", "lora_R"), False, {"x", "h"}),
        (("lora_R", "lora_B"), False, {"h", "p"}),
        ((), False, set()),
    ],
)
def test_what_is_kept_for_backward(trained, absent_core, kept):
    M, n, r = 50, 24, 4
    arguments = factors(trained, absent_core, M=M, n=n, r=r)
    known = {id(t) for name, t in arguments.items() if name != "x"}
    sizes = []

    def pack(tensor):
        if id(tensor) not in known and tensor.shape[0] == M:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lorasb_linear(**arguments)
    expected = {"x": M * n, "h": M * r, "p": M * r}
    assert sorted(sizes) == sorted(expected[name] for name in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True])
def test_low_precision_is_within_the_contract_of_eager(dtype, masters):
    """A and B in the dtype of x, and as fp32 masters that are rounded to it."""
    ours = factors(("lora_A", "lora_B"), True, M=33, n=96, m=80, r=24, dtype=dtype)
    if masters:
        for name in ("lora_A", "lora_B"):
            fine = ours[name].detach().float() * (1 + 1e-3)
            ours[name] = fine.requires_grad_()
    eager = {k: None if v is None else v.detach().to(dtype) for k, v in ours.items()}
    exact = {k: None if v is None else v.double() for k, v in eager.items()}
    outputs = {}
    dy = torch.randn(33, 80).to(dtype)
    for name, arguments in (("eager", eager), ("exact", exact)):
        for part in ("x", "lora_A", "lora_B"):
            arguments[part] = arguments[part].requires_grad_()
        h = arguments["x"] @ arguments["lora_A"].T
        y = torch.nn.functional.linear(arguments["x"], arguments["weight"], arguments["bias"])
        outputs[name] = y + 0.5 * h @ arguments["lora_B"].T
        outputs[name].backward(dy.to(outputs[name].dtype))
    y = lorasb_linear(**ours, scaling=0.5)
    y.backward(dy)
    assert_within_contract(y, outputs["eager"], outputs["exact"], name="y")
    for part in ("x", "lora_A", "lora_B"):
        assert ours[part].grad.dtype == ours[part].dtype
        gradient = ours[part].grad
        assert_within_contract(gradient.to(dtype), eager[part].grad, exact[part].grad, name=part)


def test_gradients_of_masters_are_not_rounded_to_the_dtype_of_x():
    arguments = factors(("lora_A", "lora_B"), True, M=64, dtype=torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    lorasb_linear(**arguments).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        gradient = arguments[name].grad
        assert (gradient != gradient.bfloat16().float()).any(), name


def test_autocast_keeps_the_gradients_of_fp32_factors_exact():
    arguments = factors(("lora_A", "lora_B"), True, M=64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lorasb_linear(**arguments)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    low = {
        name: t if t is None or name in FACTORS else t.detach().bfloat16()
        for name, t in arguments.items()
    }
    for name in ("lora_A", "lora_B"):
        low[name] = low[name].detach().clone().requires_grad_()
    lorasb_linear(**low).sum().backward()
    for name in ("lora_A", "lora_B"):
        assert torch.equal(arguments[name].grad, low[name].grad)


def test_dropout_masks_the_input_of_the_gradient_of_A():
    arguments = factors(("lora_A", "lora_B"), True)
    torch.manual_seed(5)
    y = lorasb_linear(**arguments, dropout=0.4)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    dropped = arguments["x"].detach() * keep_mask(7, 24, 0.4, seed) / 0.6
    y.sum().backward()
    q = torch.ones(7, 16).double() @ arguments["lora_B"].detach()
    torch.testing.assert_close(arguments["lora_A"].grad, q.T @ dropped)
    p = dropped @ arguments["lora_A"].detach().T
    torch.testing.assert_close(arguments["lora_B"].grad, torch.ones(16, 7).double() @ p)


def test_a_group_equals_its_layers():
    layers = [factors(("lora_A", "lora_B"), True, m=m, seed=m) for m in (16, 10)]
    x = layers[0].pop("x")
    layers[1].pop("x")
    # One of the two A's is frozen: the gradient of the other must not change.
    layers[1]["lora_A"] = layers[1]["lora_A"].detach()
    columns = {name: [layer[name] for layer in layers] for name in layers[0]}

    def results(outputs):
        loss = sum(y.sin().sum() for y in outputs)
        leaves = [x, layers[0]["lora_A"], *columns["lora_B"]]
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    group = lorasb_group(
        x,
        columns["weight"],
        columns["lora_A"],
        columns["lora_R"],
        columns["lora_B"],
        columns["bias"],
        0.5,
    )
    alone = [lorasb_linear(x, **layer, scaling=0.5) for layer in layers]
    for ours, expected in zip(results(group), results(alone), strict=True):
        torch.testing.assert_close(ours, expected)


def test_compiles_as_one_graph_for_any_number_of_tokens():
    arguments = factors(("lora_A", "lora_B"), True, dtype=torch.float32)
    x = arguments.pop("x").detach()
    compiled = torch.compile(
        lambda x: lorasb_linear(x, **arguments, scaling=0.5),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (3, 7):
        found = []
        for function in (compiled, lambda x: lorasb_linear(x, **arguments, scaling=0.5)):
            y = function(x[:rows])
            leaves = (arguments["lora_A"], arguments["lora_B"])
            found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager)


def test_an_absent_core_is_the_identity():
    arguments = factors(("lora_A",), True)
    identity = {**arguments, "lora_R": torch.eye(4, dtype=torch.float64)}
    assert torch.equal(lorasb_linear(**arguments), lorasb_linear(**identity))


def test_the_cuda_gap_is_named():
    trained = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradient of lora_A has no dropout; expected"):
        check_backend("cuda", trained, 0.1)
    check_backend("cuda", trained, 0.0)
    check_backend("triton", trained, 0.1)
    check_backend("cuda", torch.ones(2, 3), 0.1)
