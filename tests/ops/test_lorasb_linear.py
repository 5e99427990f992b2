"""`lorasb_linear`: values, gradients, what it keeps for backward, what it refuses."""

import gc
import math
import weakref

import pytest
import torch

from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.ops.dropout import keep_mask, keep_threshold, key_of, random_bits
from tests.contract import assert_within_contract


def operands(M=7, n=24, m=16, r=4, dtype=torch.float64, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    core_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(M, n).to(dtype).requires_grad_(),
        "weight": (normal(m, n) / math.sqrt(n)).to(dtype),
        "lora_A": (normal(r, n) / math.sqrt(n)).to(dtype),
        "lora_R": normal(r, r).to(core_dtype).requires_grad_(),
        "lora_B": normal(m, r).to(dtype),
        "bias": normal(m).to(dtype) if bias else None,
    }


def formula(x, weight, lora_A, lora_R, lora_B, bias, scaling):
    """y = x (W + s·B·R·A)ᵀ + bias, literally."""
    y = x @ (weight + scaling * lora_B @ lora_R @ lora_A).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_values_and_gradients_equal_the_formula(bias, scaling):
    ours, plain = operands(bias=bias), operands(bias=bias)
    y = lorasb_linear(**ours, scaling=scaling)
    expected = formula(**plain, scaling=scaling)
    dy = torch.randn_like(expected)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["x"].grad, plain["x"].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["lora_R"].grad, plain["lora_R"].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_the_contract_of_eager(dtype):
    ours = operands(33, 96, 80, 24, dtype)
    scaling = 0.5
    y = lorasb_linear(**ours, scaling=scaling)
    dy = torch.randn_like(y)
    y.backward(dy)
    eager = {k: v.detach().requires_grad_(v.requires_grad) for k, v in ours.items()}
    h = eager["x"] @ eager["lora_A"].T
    core = eager["lora_R"].to(dtype)
    eager_y = (
        eager["x"] @ eager["weight"].T
        + scaling * ((h @ core.T) @ eager["lora_B"].T)
        + eager["bias"]
    )
    eager_y.backward(dy)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in ours.items()}
    exact_y = formula(**exact, scaling=scaling)
    exact_y.backward(dy.double())
    assert_within_contract(y, eager_y, exact_y, name="y")
    assert_within_contract(ours["x"].grad, eager["x"].grad, exact["x"].grad, name="dx")
    assert_within_contract(
        ours["lora_R"].grad, eager["lora_R"].grad, exact["lora_R"].grad, name="dR"
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    arguments = operands()

    def function(x, lora_R):
        torch.manual_seed(3)
        return lorasb_linear(**{**arguments, "x": x, "lora_R": lora_R}, dropout=dropout)

    assert torch.autograd.gradcheck(function, (arguments["x"], arguments["lora_R"]))


def test_only_h_is_saved():
    arguments = operands(M=50, dtype=torch.float32)
    frozen = {id(tensor) for name, tensor in arguments.items() if name != "x"}
    activations = []

    def pack(tensor):
        if id(tensor) not in frozen:
            activations.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lorasb_linear(**arguments)
    assert activations == [50 * 4]


def test_an_intermediate_input_is_freed_while_the_graph_lives():
    arguments = operands(M=50, dtype=torch.float32)
    leaf = arguments.pop("x")
    x = leaf * 2.0
    y = lorasb_linear(x, **arguments)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()
    assert leaf.grad is not None


def test_no_input_gradient_is_computed_when_x_needs_none():
    arguments = operands()
    arguments["x"] = arguments["x"].detach()
    lorasb_linear(**arguments).sum().backward()
    assert arguments["x"].grad is None
    assert arguments["lora_R"].grad is not None


def test_double_backward_is_refused():
    arguments = operands()
    loss = lorasb_linear(**arguments).square().sum()
    (gradient,) = torch.autograd.grad(loss, arguments["lora_R"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (2, 3, 24)])
def test_leading_dimensions(shape):
    arguments = operands()
    arguments["x"] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = lorasb_linear(**arguments)
    assert y.shape == (*shape[:-1], 16)
    torch.testing.assert_close(y, formula(**arguments, scaling=1.0))
    y.sum().backward()
    assert arguments["x"].grad.shape == shape


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strided_inputs(view):
    arguments = operands()
    base = torch.randn(48, 48, dtype=torch.float64)
    arguments["x"] = {
        "transposed": base[:24, :9].T,
        "sliced": base[::2, 7:31],
        "expanded": base[0, :24].expand(5, 24),
    }[view]
    torch.testing.assert_close(lorasb_linear(**arguments), formula(**arguments, scaling=1.0))


def test_expanded_output_gradients():
    arguments = operands()
    lorasb_linear(**arguments).sum().backward()  # the gradient of sum() has stride 0
    reference = operands()
    formula(**reference, scaling=1.0).sum().backward()
    torch.testing.assert_close(arguments["lora_R"].grad, reference["lora_R"].grad)


def test_compiles_as_one_graph_for_any_number_of_tokens():
    arguments = operands(dtype=torch.float32)
    x = arguments.pop("x")
    compiled = torch.compile(
        lambda x: lorasb_linear(x, **arguments, scaling=0.5), fullgraph=True, dynamic=True
    )
    for rows in (3, 7):
        arguments["lora_R"].grad = None
        compiled(x[:rows]).sum().backward()
        ours = arguments["lora_R"].grad.clone()
        arguments["lora_R"].grad = None
        lorasb_linear(x[:rows], **arguments, scaling=0.5).sum().backward()
        torch.testing.assert_close(ours, arguments["lora_R"].grad)


def test_autocast_casts_all_but_the_core():
    arguments = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lorasb_linear(**arguments)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert arguments["x"].grad.dtype == torch.float32
    assert arguments["lora_R"].grad.dtype == torch.float32
    low = {k: v.detach() if k == "lora_R" else v.detach().bfloat16() for k, v in arguments.items()}
    assert torch.equal(y, lorasb_linear(**low))


class TestDropout:
    def test_the_mask_is_a_function_of_seed_and_index(self):
        seed = torch.tensor([1234567890123456789])
        bits = random_bits(6, 10, seed)
        assert torch.equal(bits.view(-1), random_bits(60, 1, seed).view(-1))
        assert not torch.equal(bits, random_bits(6, 10, seed + 2))
        assert bits.min() >= 0
        assert bits.max() < 2**32

    def test_bits_equal_the_published_generator(self):
        """Squares-32 in Python integers, arXiv:2004.06278, figure 1."""
        seed = torch.tensor([0x1FD07A4C2F6E93B5])
        key = key_of(seed).item() & (2**64 - 1)

        def rotate(value):
            return ((value >> 32) | (value << 32)) & (2**64 - 1)

        def squares32(counter):
            y = x = counter * key & (2**64 - 1)
            z = (y + key) & (2**64 - 1)
            for addend in (y, z, y):
                x = rotate((x * x + addend) & (2**64 - 1))
            return ((x * x + z) & (2**64 - 1)) >> 32

        bits = random_bits(100, 1, seed).view(-1).tolist()
        assert bits == [squares32(i) for i in range(100)]

    @pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
    def test_the_share_dropped_is_p(self, dropout):
        count = 400_000
        kept = keep_mask(count // 8, 8, dropout, torch.tensor([987654321987654321]))
        deviation = math.sqrt(dropout * (1 - dropout) / count)
        assert abs(kept.double().mean().item() - (1 - dropout)) < 4.5 * deviation
        neighbours = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
        assert abs(neighbours - (1 - dropout) ** 2) < 6 * deviation

    def test_the_key_is_splitmix_64_of_the_seed_made_odd(self):
        """The finalizer in Python integers, Steele, Lea and Flood, OOPSLA 2014, figure 16."""
        for seed in (0, 5, 2**62 + 3, 2**63 - 1):
            z = (seed + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            expected = (z ^ (z >> 31)) | 1
            assert key_of(torch.tensor([seed])).item() % 2**64 == expected

    @pytest.mark.parametrize("seed", [0, 1, 2, 5, 2**20, 2**32, 2**61, 2**62, 2**62 + 3])
    def test_any_seed_keeps_its_share(self, seed):
        count = 1 << 16
        kept = keep_mask(count // 64, 64, 0.3, torch.tensor([seed])).double().mean().item()
        assert abs(kept - 0.7) < 4.5 * math.sqrt(0.21 / count)

    def test_threshold_never_reaches_the_32_bit_limit(self):
        assert keep_threshold(0.0) == 0
        assert keep_threshold(0.5) == 2**31
        assert keep_threshold(1 - 1e-12) == 2**32 - 1

    def test_only_the_adapter_sees_it_and_only_in_training(self):
        arguments = operands()
        frozen = {**arguments, "lora_R": torch.zeros(4, 4, dtype=torch.float64)}
        torch.testing.assert_close(
            lorasb_linear(**frozen, dropout=0.9), lorasb_linear(**frozen), rtol=0, atol=0
        )
        evaluated = lorasb_linear(**arguments, dropout=0.9, training=False)
        assert torch.equal(evaluated, lorasb_linear(**arguments))
        assert not torch.equal(lorasb_linear(**arguments, dropout=0.9), evaluated)

    def test_follows_the_global_generator(self):
        arguments = operands()
        torch.manual_seed(5)
        first = lorasb_linear(**arguments, dropout=0.5)
        second = lorasb_linear(**arguments, dropout=0.5)
        torch.manual_seed(5)
        assert torch.equal(first, lorasb_linear(**arguments, dropout=0.5))
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is a list; expected a torch.Tensor"),
        ({"x": torch.ones(7, 23).double()}, ValueError, r"x has shape \(7, 23\).*dimension of 24"),
        ({"x": torch.ones(7, 24).int()}, TypeError, "x has dtype torch.int32"),
        ({"weight": torch.ones(16, 24)}, TypeError, "weight has dtype torch.float32; expected"),
        ({"weight": torch.ones(16).double()}, ValueError, r"weight has shape \(16,\)"),
        ({"lora_A": torch.ones(3, 24).double()}, ValueError, r"lora_A .*\(3, 24\).*\(4, 24\)"),
        ({"lora_B": torch.ones(4, 16).double()}, ValueError, r"lora_B .*\(4, 16\).*\(16, 4\)"),
        ({"lora_R": torch.ones(4, 5).double()}, ValueError, r"lora_R .*\(4, 5\).*\[r, r\]"),
        ({"lora_R": torch.ones(513, 513).double()}, ValueError, "rank 513"),
        ({"lora_R": torch.ones(4, 4).half()}, TypeError, "lora_R has dtype torch.float16"),
        ({"bias": torch.ones(15).double()}, ValueError, r"bias .*\(15,\).*\(16,\)"),
        ({"bias": torch.ones(16, device="meta").double()}, ValueError, "bias is on meta"),
        ({"scaling": math.inf}, ValueError, "scaling is inf"),
        ({"scaling": "1"}, TypeError, "scaling is a str"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0; expected 0 <= dropout < 1"),
        ({"dropout": math.nan}, ValueError, "dropout is nan"),
        ({"backend": "cublas"}, ValueError, "backend is 'cublas'; expected one of 'auto'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        lorasb_linear(**{**operands(), **change})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_frozen_arguments_must_be_frozen(name):
    arguments = operands()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires grad; expected it frozen"):
        lorasb_linear(**arguments)


def test_a_product_beyond_fp16_is_not_finite_even_with_a_core_of_zeros():
    """As the docstring says; the frozen product is finite, and so is bf16's range."""
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True)):
        arguments = operands(dtype=dtype)
        arguments["x"] = torch.full((2, 24), 60_000.0, dtype=dtype)
        arguments["x"][1] = 1
        arguments |= {"lora_A": torch.ones(4, 24, dtype=dtype), "lora_R": torch.zeros(4, 4)}
        arguments["weight"] = torch.eye(16, 24, dtype=dtype)
        y = lorasb_linear(**arguments)
        assert bool(y[0].isfinite().all()) == finite
        assert y[1].isfinite().all()


def test_the_interpreter_of_triton_is_refused_in_bf16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = operands(dtype=torch.bfloat16)
    message = "backend='triton' cannot run: Triton's interpreter .* multiplies bfloat16 wrongly"
    with pytest.raises(RuntimeError, match=message):
        lorasb_linear(**arguments, backend="triton")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_input_never_comes_out_clean(value):
    arguments = operands()
    x = arguments["x"].detach().clone()
    x[2, 5] = value
    arguments["x"] = x.requires_grad_()
    y = lorasb_linear(**arguments)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4, 5, 6]].isfinite().all()
    y.sum().backward()
    assert not arguments["lora_R"].grad.isfinite().any()
