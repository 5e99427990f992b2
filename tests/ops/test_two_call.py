"""The two GEMMs of `expand` without dropout: their sum, their order and its reason."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasb_kernels.ops.two_call import FROZEN_FIRST_FROM, two_call


class Products(TorchDispatchMode):
    """Records the contraction of every matrix product, and whether it adds to its output."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left = args[0] if name == "aten::mm" else args[1]
            self.products.append((name.removeprefix("aten::"), left.shape[1]))
        return function(*args, **(kwargs or {}))


def operands(M, N, K, r, dtype=torch.float32, delta=1.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    weight, factor = draw(N, K, scale=K**-0.5), draw(N, r, scale=delta * r**-0.5)
    return draw(M, K), weight, draw(M, r), factor, draw(N)


@pytest.mark.parametrize("bias", [True, False])
def test_the_delta_comes_first_and_the_frozen_product_adds_to_it(bias):
    x, weight, p, factor, b = operands(5, 7, 24, 3)
    with Products() as recorded:
        two_call(x, weight, p, factor, b if bias else None)
    assert recorded.products == [("addmm" if bias else "mm", 3), ("addmm_", 24)]


def test_a_long_contraction_comes_first():
    x, weight, p, factor, b = operands(2, 3, FROZEN_FIRST_FROM, 4)
    with Products() as recorded:
        two_call(x, weight, p, factor, b)
    assert [inner for _, inner in recorded.products] == [FROZEN_FIRST_FROM, 4]


@pytest.mark.parametrize("K", [24, FROZEN_FIRST_FROM])
@pytest.mark.parametrize("bias", [True, False])
def test_both_orders_give_the_sum(K, bias):
    x, weight, p, factor, b = (t.double() for t in operands(5, 7, K, 3))
    b = b if bias else None
    expected = x @ weight.T + p @ factor.T + (0 if b is None else b)
    torch.testing.assert_close(two_call(x, weight, p, factor, b), expected)


def test_the_delta_first_halves_the_rounding_of_a_small_delta():
    """y is rounded to bf16 while it is the delta, a hundredth of the result, not a second time."""
    x, weight, p, factor, _ = operands(64, 96, 256, 8, torch.bfloat16, delta=0.01)
    exact = x.double() @ weight.double().T + p.double() @ factor.double().T

    def error(y):
        return ((y.double() - exact).norm() / exact.norm()).item()

    frozen_first = torch.nn.functional.linear(x, weight).addmm_(p, factor.T)
    assert error(two_call(x, weight, p, factor, None)) < 0.8 * error(frozen_first)
