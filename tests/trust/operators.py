"""Each operation on operands that hypothesis draws, with a verdict on each output.

Every operation runs twice: other bits on the second run are a fault.
"""

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from lorasb_kernels import functional
from lorasb_kernels.ops.bitplanes import unpack, words
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.factor_gradient import factor_gradient
from lorasb_kernels.ops.shrink import shrink
from tests import formulas
from tests.ops.operands import as_tuple, same_bits
from tests.trust import draws
from tests.trust.judging import Verdict, judge

ROWS = ("contiguous", "padded")  # layouts with a contiguous last dimension
EITHER = (*ROWS, "transposed")
ANY = (*EITHER, "stepped")
FP32 = torch.float32


class Case:
    """Operands drawn one after another, each from its own seed."""

    def __init__(self, data, dtype: torch.dtype, device: torch.device):
        self.data, self.dtype, self.device = data, dtype, device
        self.seed = data(st.integers(0, 2**31))
        self.kinds: dict[str, str] = {}

    def draw(self, strategy):
        return self.data(strategy)

    def operand(self, *shape, layouts=("contiguous",), dtype=None, plain=False, largest=True):
        """A tensor of size about 1 / sqrt(columns) for two dimensions or more."""
        dtype = dtype or self.dtype
        fill = self.draw(draws.fills(dtype, layouts, plain, largest))
        self.seed += 1
        return draws.make(fill, shape, dtype, self.device, self.seed)

    def dropout(self):
        """p, and the seed that is drawn after `torch.manual_seed(self.seed)`; None without."""
        dropout = self.draw(draws.dropouts())
        if dropout == 0:
            return 0.0, None
        torch.manual_seed(self.seed)
        return dropout, new_seed(self.device)


def judged(case: Case, run: Callable, formula: Callable, *operands) -> list[Verdict]:
    """Runs twice; judges each output against `formula` on the operands."""
    outputs = as_tuple(run())
    again = as_tuple(run())
    eager = formulas.eager(formula, case.dtype, case.device, *operands)
    exact = formulas.exact(formula, *operands)
    terms = formulas.magnitudes(formula, *operands, floor=torch.finfo(case.dtype).tiny)
    verdicts = []
    for out, other, *references in zip(outputs, again, eager, exact, terms, strict=True):
        if not same_bits(out.detach(), other.detach()):
            verdicts.append(Verdict(0, 0, "other bits on the second run"))
        else:
            verdicts.append(judge(out, *references, case.dtype))
    return verdicts


def try_shrink(case: Case, backend: str) -> list[Verdict]:
    M, n, r = case.draw(draws.rows()), case.draw(draws.sizes()), case.draw(draws.ranks())
    x = case.operand(M, n, layouts=ROWS)
    A = case.operand(r, n, layouts=EITHER)
    R = case.operand(r, r, layouts=EITHER, dtype=FP32)
    s = case.draw(draws.scalings())
    operands = (x, A, R, s, *case.dropout())
    return judged(case, lambda: shrink(*operands, backend), formulas.shrink, *operands)


def try_core_backward(case: Case, backend: str) -> list[Verdict]:
    M, m, r = case.draw(draws.rows()), case.draw(draws.sizes()), case.draw(draws.ranks())
    operands = (
        case.operand(M, m, layouts=ROWS),
        case.operand(M, r),
        case.operand(m, r, layouts=EITHER),
        case.operand(r, r, layouts=EITHER, dtype=FP32),
        case.draw(draws.scalings()),
    )
    return judged(
        case, lambda: core_backward(*operands, backend), formulas.core_backward, *operands
    )


def try_expand(case: Case, backend: str) -> list[Verdict]:
    M, K, r = case.draw(draws.rows()), case.draw(draws.sizes()), case.draw(draws.ranks())
    N = case.draw(draws.sizes())
    x = case.operand(M, K, layouts=ROWS)
    weight = case.operand(N, K, layouts=EITHER)
    p = case.operand(M, r)
    factor = case.operand(N, r, layouts=EITHER)
    bias = case.operand(N) if case.draw(st.booleans()) else None
    operands = (x, weight, p, factor, bias, *case.dropout())
    return judged(case, lambda: expand(*operands, backend), formulas.expand, *operands)


def leading_dimensions(case: Case) -> tuple[int, ...]:
    return case.draw(
        st.lists(st.integers(0, 5), max_size=3).map(tuple) | draws.rows().map(lambda M: (M,))
    )


def layer(case: Case, tokens: tuple[int, ...], n: int, r: int, plain: bool):
    """W, A, R, B, bias and dy of one layer."""
    m = case.draw(draws.sizes(70))
    return (
        case.operand(m, n, layouts=ANY, plain=plain),
        case.operand(r, n, layouts=ANY, plain=plain),
        case.operand(r, r, layouts=ANY, dtype=FP32, plain=plain).requires_grad_(),
        case.operand(m, r, layouts=ANY, plain=plain),
        case.operand(m, plain=plain) if case.draw(st.booleans()) else None,
        case.operand(*tokens, m, layouts=ANY),
    )


def try_lorasb_linear(case: Case, backend: str) -> list[Verdict]:
    """The public function, forward and backward, any strides and leading dimensions."""
    tokens, n, r = leading_dimensions(case), case.draw(draws.sizes(70)), case.draw(draws.ranks(33))
    x = case.operand(*tokens, n, layouts=ANY).requires_grad_()
    *frozen, dy = layer(case, tokens, n, r, plain=False)
    s = case.draw(draws.scalings())
    dropout, seed = case.dropout()

    def run():
        torch.manual_seed(case_seed)
        y = functional.lorasb_linear(x, *frozen, s, dropout, backend=backend)
        assert y.shape == dy.shape
        dx, dR = torch.autograd.grad(y, (x, frozen[2]), dy)
        assert dx.shape == x.shape
        return y.reshape(-1, y.shape[-1]), dx.reshape(-1, n), dR

    case_seed = case.seed
    flat = (x.reshape(-1, n), *frozen, dy.reshape(-1, dy.shape[-1]))
    return judged(case, run, formulas.lorasb_linear, *flat, s, dropout, seed)


def try_lorasb_group(case: Case, backend: str) -> list[Verdict]:
    """One to three layers on one input, each with a dropout mask of its own."""
    tokens, n, r = leading_dimensions(case), case.draw(draws.sizes(70)), case.draw(draws.ranks(20))
    x = case.operand(*tokens, n, layouts=ANY, largest=False).requires_grad_()
    layers = [layer(case, tokens, n, r, plain=True) for _ in range(case.draw(st.integers(1, 3)))]
    s = case.draw(draws.scalings())
    dropout, seed = case.dropout()
    seeds = [seed, *(new_seed(case.device) if dropout else None for _ in layers[1:])]
    weights, As, Rs, Bs, biases, dys = zip(*layers, strict=True)

    def run():
        torch.manual_seed(case_seed)
        ys = functional.lorasb_group(x, weights, As, Rs, Bs, biases, s, dropout, backend=backend)
        dx, *dRs = torch.autograd.grad(ys, (x, *Rs), dys)
        return *(y.reshape(-1, y.shape[-1]) for y in ys), dx.reshape(-1, n), *dRs

    case_seed = case.seed
    flat = [(*frozen, dy.reshape(-1, dy.shape[-1])) for *frozen, dy in layers]
    return judged(case, run, formulas.lorasb_group, x.reshape(-1, n), flat, s, dropout, seeds)


def try_lora(case: Case, backend: str) -> list[Verdict]:
    """The public function without a core; A and B are trained, fp32 whatever the rest is."""
    tokens, n, r = leading_dimensions(case), case.draw(draws.sizes(70)), case.draw(draws.ranks(33))
    m = case.draw(draws.sizes(70))
    x = case.operand(*tokens, n, layouts=ANY).requires_grad_()
    weight = case.operand(m, n, layouts=ANY)
    A = case.operand(r, n, layouts=ANY, dtype=FP32).requires_grad_()
    B = case.operand(m, r, layouts=ANY, dtype=FP32).requires_grad_()
    bias = case.operand(m) if case.draw(st.booleans()) else None
    dy = case.operand(*tokens, m, layouts=ANY)
    s = case.draw(draws.scalings())
    dropout, seed = 0.0, None
    if backend != "cuda":  # which refuses dropout before a trained A
        dropout, seed = case.dropout()

    def run():
        torch.manual_seed(case_seed)
        y = functional.lorasb_linear(x, weight, A, None, B, bias, s, dropout, backend=backend)
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
        return y.reshape(-1, m), dx.reshape(-1, n), dA, dB

    case_seed = case.seed
    flat = (x.reshape(-1, n), weight, A, B, bias, dy.reshape(-1, m))
    return judged(case, run, formulas.lora, *flat, s, dropout, seed)


def try_factor_gradient(case: Case, backend: str) -> list[Verdict]:
    M, k, r = case.draw(draws.rows()), case.draw(draws.sizes()), case.draw(draws.ranks())
    left, rows = case.operand(M, r, layouts=ROWS), case.operand(M, k, layouts=ROWS)
    # The kernel of CUDA has no dropout.
    operands = (left, rows, *((0.0, None) if backend == "cuda" else case.dropout()))
    case.dtype = FP32  # the sum, whatever the dtype of the operands
    return judged(
        case, lambda: factor_gradient(*operands, backend), formulas.factor_gradient, *operands
    )


def gradient_operands(case: Case):
    tokens, m, n = leading_dimensions(case), case.draw(draws.sizes(70)), case.draw(draws.sizes())
    dy = case.operand(*tokens, m, layouts=ANY)
    x = case.operand(*tokens, n, layouts=ANY)
    weight = case.operand(*tokens, dtype=FP32) if case.draw(st.booleans()) else None
    return dy, x, weight


def rows_of(dy, x, weight):
    flat = None if weight is None else weight.reshape(-1)
    return dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), flat


def try_sign_accumulate(case: Case, backend: str) -> list[Verdict]:
    dy, x, weight = gradient_operands(case)
    acc = case.operand(dy.shape[-1], x.shape[-1], layouts=ROWS, dtype=FP32)

    def run():
        out = draws.lay_out(acc.clone(), "padded")
        assert functional.sign_accumulate_(out, dy, x, weight, backend=backend) is out
        return out.contiguous()

    case.dtype = FP32  # the sum, whatever the dtype of the operands
    return judged(case, run, formulas.sign_accumulate, acc, *rows_of(dy, x, weight))


def signs_of(planes, columns: int) -> torch.Tensor:
    """float64 on the CPU, NaN for non-finite elements; asserts that padding bits are 0."""
    padded = unpack(*(p.cpu() for p in planes), words(columns) * 32, torch.float64)
    assert not padded[:, columns:].any(), "padding bits are 0"
    return padded[:, :columns]


def try_sign_gradient(case: Case, backend: str) -> list[Verdict]:
    """A wrong sign is judged by how far from 0 the exact sum is."""
    dy, x, weight = gradient_operands(case)
    planes = functional.sign_gradient(dy, x, weight, backend=backend)
    again = functional.sign_gradient(dy, x, weight, backend=backend)
    if not all(map(torch.equal, planes, again)):
        return [Verdict(0, 0, "other bits on the second run")]
    signs = signs_of(planes, x.shape[-1])
    operands = (torch.zeros(signs.shape), *rows_of(dy, x, weight))
    limits = torch.finfo(FP32)
    (exact,) = formulas.exact(formulas.sign_accumulate, *operands)
    (terms,) = formulas.magnitudes(formulas.sign_accumulate, *operands, floor=limits.tiny)
    if (~exact.isfinite() & signs.isfinite()).any():
        return [Verdict(0, 0, "a sign where the sum is not finite")]
    (eager,) = formulas.eager(formulas.sign_accumulate, FP32, dy.device, *operands)
    fits = exact.isfinite() & eager.isfinite().cpu() & (terms < limits.max / 2)
    if (fits & ~signs.isfinite()).any():
        return [Verdict(0, 0, "no sign where the sum is finite")]
    wrong = fits & (signs != exact.sign())
    distance = (exact.abs() / (8 * limits.eps * terms))[wrong]
    return [Verdict(0, float(distance.max()) if wrong.any() else 0.0)]


def try_pack_signs(case: Case, backend: str) -> list[Verdict]:
    """No arithmetic, no tolerance."""
    acc = case.operand(
        case.draw(draws.rows()), case.draw(draws.sizes(200)), layouts=ANY, dtype=FP32
    )
    planes = functional.pack_signs(acc, backend=backend)
    same = all(
        torch.equal(p.cpu(), f) for p, f in zip(planes, formulas.sign_planes(acc), strict=True)
    )
    return [Verdict(0, 0, None if same else "a wrong sign")]


def try_sign_matmul(case: Case, backend: str) -> list[Verdict]:
    m, n, q = (case.draw(strategy) for strategy in (draws.rows(), draws.sizes(), draws.sizes(70)))
    transpose = case.draw(st.booleans())
    acc = case.operand(m, n, dtype=FP32)
    planes = functional.pack_signs(acc, backend="reference")
    signs = signs_of(planes, n).to(FP32).to(case.device)
    signs = signs.T if transpose else signs
    dense = case.operand(signs.shape[1], q, layouts=ANY, dtype=FP32)
    run = lambda: functional.sign_matmul(*planes, dense, n, transpose, backend=backend)  # noqa: E731
    return judged(case, run, formulas.sign_matmul, signs, dense)


OPERATORS = {
    "shrink": try_shrink,
    "core_backward": try_core_backward,
    "expand": try_expand,
    "lorasb_linear": try_lorasb_linear,
    "lorasb_group": try_lorasb_group,
    "lora": try_lora,
    "factor_gradient": try_factor_gradient,
    "sign_accumulate_": try_sign_accumulate,
    "sign_gradient": try_sign_gradient,
    "pack_signs": try_pack_signs,
    "sign_matmul": try_sign_matmul,
}
SINGLE = ("pack_signs", "sign_matmul")  # these read fp32 only
