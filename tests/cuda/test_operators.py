"""The CUDA operators against float64: bindings, launchers and kernels, run without a GPU.

Shared memory races, missing waits, reads of unwritten memory and accesses out of bounds
raise. Outputs and scratch memory are NaN before each call.
"""

import math

import numpy as np
import pytest
import torch

import lorasb_kernels.ops.pack_signs
import lorasb_kernels.ops.sign_gradient
import lorasb_kernels.ops.sign_matmul  # noqa: F401
from lorasb_kernels.ops import bitplanes, sign_accumulate
from lorasb_kernels.ops import expand as expand_operation
from lorasb_kernels.ops.dropout import keep_mask, new_seed
from lorasb_kernels.ops.lorasb_linear import api as layer
from tests import formulas
from tests.contract import assert_within_contract
from tests.ops.operands import as_tuple, dropout_seed, eager, normal, oracle, same_bits

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 0.75
SEED = dropout_seed(CPU)


def run(simulator, operation, *arguments, **options):
    """The operator's outputs and its launches."""
    with simulator.running(**options) as launches:
        outputs = getattr(torch.ops.lorasb, f"{operation}_cuda")(*arguments)
    return as_tuple(outputs), launches


def check(simulator, operation, *arguments, **options):
    """Runs an operator and asserts the numerical contract; returns its launches."""
    outputs, launches = run(simulator, operation, *arguments, **options)
    yardstick, exact = eager(operation, *arguments), oracle(operation, *arguments)
    for index, (out, own, ref) in enumerate(zip(outputs, yardstick, exact, strict=True)):
        assert out.dtype == own.dtype
        assert_within_contract(out, own, ref, name=f"{operation}[{index}]")
    return launches


def shrink_operands(M, n, r, dtype):
    x = normal(M, n, dtype=dtype, device=CPU)
    lora_A = normal(r, n, dtype=dtype, device=CPU, seed=1) / math.sqrt(n)
    return x, lora_A, normal(r, r, dtype=FP32, device=CPU, seed=2) / math.sqrt(r)


def core_backward_operands(M, m, r, dtype):
    dy = normal(M, m, dtype=dtype, device=CPU)
    h = normal(M, r, dtype=dtype, device=CPU, seed=1)
    lora_B = normal(m, r, dtype=dtype, device=CPU, seed=2) / math.sqrt(m)
    return dy, h, lora_B, normal(r, r, dtype=FP32, device=CPU, seed=3) / math.sqrt(r), SCALING


def expand_operands(M, N, K, r, dtype, transposed=False):
    x = normal(M, K, dtype=dtype, device=CPU)
    weight = normal(N, K, dtype=dtype, device=CPU, seed=1) / math.sqrt(K)
    p = normal(M, r, dtype=dtype, device=CPU, seed=2)
    factor = normal(N, r, dtype=dtype, device=CPU, seed=3) / math.sqrt(r)
    if transposed:
        weight, factor = weight.T.contiguous().T, factor.T.contiguous().T
    return x, weight, p, factor


def gradient_operands(M, m, n, dtype, weighted):
    dy = normal(M, m, dtype=dtype, device=CPU)
    x = normal(M, n, dtype=dtype, device=CPU, seed=1)
    # Small enough that weight times gradient falls below the smallest fp16.
    weight = normal(M, dtype=FP32, device=CPU, seed=2).abs() * 1e-6 if weighted else None
    return dy, x, weight


def planes_of(m, n):
    signs = torch.randint(-1, 2, (m, n), generator=torch.Generator().manual_seed(m + n)).float()
    return signs, *bitplanes.signs_of(signs)


# One row, odd sizes, no multiple of a tile, ranks of both buckets, and split over n.
PROJECTIONS = [
    (1, 64, 8, BF16, 0.0),
    (33, 130, 20, BF16, 0.0),
    (5, 333, 25, BF16, 0.3),
    (65, 96, 128, BF16, 0.0),
    (37, 72, 200, BF16, 0.3),
    (33, 520, 24, BF16, 0.3),
    (33, 130, 20, FP16, 0.3),
    (20, 264, 96, FP16, 0.0),
    (33, 130, 20, FP32, 0.3),
    (9, 130, 64, FP32, 0.0),
    pytest.param(70, 200, 512, BF16, 0.0, marks=pytest.mark.slow),
    pytest.param(40, 72, 200, FP16, 0.3, marks=pytest.mark.slow),
    pytest.param(37, 72, 200, FP32, 0.3, marks=pytest.mark.slow),
    pytest.param(70, 2000, 32, BF16, 0.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("M", "n", "r", "dtype", "dropout"), PROJECTIONS)
def test_shrink(M, n, r, dtype, dropout, simulator):
    seed = SEED if dropout else None
    check(simulator, "shrink", *shrink_operands(M, n, r, dtype), SCALING, dropout, seed)


def group_operands(M, n, r, layers, dtype):
    x, _, _ = shrink_operands(M, n, r, dtype)
    As = [normal(r, n, dtype=dtype, device=CPU, seed=i) / math.sqrt(n) for i in range(layers)]
    Rs = [normal(r, r, dtype=FP32, device=CPU, seed=9 + i) / math.sqrt(r) for i in range(layers)]
    return x, As, Rs


@pytest.mark.parametrize(
    ("M", "n", "r", "layers", "dtype"),
    [(33, 200, 24, 3, BF16), (5, 333, 25, 4, FP16), (70, 72, 96, 2, BF16), (9, 70, 9, 3, FP32)],
)
def test_shrink_group(M, n, r, layers, dtype, simulator):
    """One launch for each three layers; layers of any strides; none has a part of another."""
    x, As, Rs = group_operands(M, n, r, layers, dtype)
    As[0], Rs[1] = As[0].T.contiguous().T, Rs[1].T.contiguous().T
    (h, p), launches = run(simulator, "shrink_group", x, As, Rs, SCALING, multiprocessors=8)
    assert len(launches) == math.ceil(layers / 3)
    assert h.shape == p.shape == (layers, M, r)
    for index in range(layers):
        arguments = x, As[index], Rs[index], SCALING, 0.0, None
        yardstick, exact = eager("shrink", *arguments), oracle("shrink", *arguments)
        for out, own, ref in zip((h[index], p[index]), yardstick, exact, strict=True):
            assert_within_contract(out, own, ref, name=f"layer {index}")


@pytest.mark.parametrize(("M", "m", "r", "dtype", "_"), PROJECTIONS)
def test_core_backward(M, m, r, dtype, _, simulator):
    check(simulator, "core_backward", *core_backward_operands(M, m, r, dtype), multiprocessors=4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "dtype", "multiprocessors"),
    [
        (1, 33, 64, 8, BF16, 64),
        (70, 200, 96, 24, BF16, 1),
        (130, 140, 77, 20, BF16, 1),
        (40, 71, 50, 96, BF16, 64),
        (33, 70, 96, 24, FP16, 1),
        (33, 70, 96, 24, FP32, 1),
        (33, 71, 50, 9, FP32, 64),
    ],
)
def test_expand(M, N, K, r, dtype, multiprocessors, transposed, simulator):
    operands = expand_operands(M, N, K, r, dtype, transposed)
    bias = normal(N, dtype=dtype, device=CPU, seed=4)
    check(simulator, "expand", *operands, bias, 0.0, None, multiprocessors=multiprocessors)
    check(simulator, "expand", *operands, None, 0.3, SEED, multiprocessors=multiprocessors)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_cublas_is_preferred_the_kernel_only_writes(
    dropout, transposed, simulator, monkeypatch
):
    """The frozen product is torch's; the kernel writes drop(p Bᵀ) + bias, and reads no y."""
    M, N, K, r = 40, 72, 256, 24
    monkeypatch.setattr(expand_operation, "prefers_cublas", lambda device: True)
    operands = expand_operands(M, N, K, r, BF16, transposed)
    bias, seed = normal(N, dtype=BF16, device=CPU, seed=4), SEED if dropout else None
    arguments = *operands, bias, dropout, seed
    with simulator.running() as launches:
        y = expand_operation.expand(*arguments, "cuda")
    (own,), (exact,) = eager("expand", *arguments), oracle("expand", *arguments)
    assert_within_contract(y, own, exact)
    assert len(launches) == (dropout > 0)
    for launch in launches:
        assert launch.stats.global_write_bytes == 2 * M * N
        tiles = math.ceil(M / 32) * math.ceil(N / 64)
        assert launch.stats.global_read_bytes <= tiles * (2 * (32 + 64) * 32 + 128 * 64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("M", "m", "n"), [(0, 5, 6), (9, 0, 6), (9, 5, 0), (7, 33, 40), (70, 140, 131)]
)
def test_sign_gradient_and_accumulate(M, m, n, dtype, weighted, simulator):
    dy, x, weight = gradient_operands(M, m, n, dtype, weighted)
    scale = 1e-6 if weighted else 1.0
    start = normal(m, n, dtype=FP32, device=CPU, seed=5) * scale
    acc = start.clone()
    with simulator.running():
        torch.ops.lorasb.sign_accumulate_cuda(acc, dy, x, weight)
    (yardstick,) = eager("sign_accumulate", start, dy, x, weight)
    (exact,) = oracle("sign_accumulate", start, dy, x, weight)
    assert_within_contract(acc, yardstick, exact, name="acc")

    (positive, negative), _ = run(simulator, "sign_gradient", dy, x, weight)
    exact = exact - start.double()
    largest = exact.abs().max().clamp_min(1e-30) if exact.numel() else 0.0
    clear = exact.abs() > 1e-5 * largest
    ours = bitplanes.unpack(positive, negative, n)
    assert torch.equal(ours[clear], exact.sign().float()[clear])
    assert clear.float().mean() > 0.99 or 0 in (M, m, n)
    assert not (bitplanes.unpack(positive, negative, 32 * positive.shape[1])[:, n:] != 0).any()


@pytest.mark.parametrize(("m", "n"), [(0, 5), (3, 1), (5, 70), (9, 1100)])
def test_pack_signs(m, n, simulator):
    acc = normal(m, n, dtype=FP32, device=CPU)
    acc[acc.abs() < 0.3] = 0
    if m > 2:
        acc[0, 0], acc[1, n - 1], acc[2, 0] = math.nan, math.inf, -math.inf
    planes, _ = run(simulator, "pack_signs", acc)
    assert all(map(same_bits, planes, formulas.sign_planes(acc)))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "n", "q"), [(5, 6, 3), (70, 130, 20), (33, 300, 70)])
def test_sign_matmul(m, n, q, transpose, simulator):
    signs, positive, negative = planes_of(m, n)
    signs = signs.T if transpose else signs
    dense = normal(signs.shape[1], q, dtype=FP32, device=CPU)
    (out,), _ = run(simulator, "sign_matmul", positive, negative, dense, n, transpose)
    assert_within_contract(out, signs @ dense, signs.double() @ dense.double())


@pytest.mark.parametrize("transpose", [False, True])
def test_an_element_that_is_no_sign_multiplies_as_nan(transpose, simulator):
    signs, _, _ = planes_of(40, 70)
    signs[3, 65] = math.nan
    positive, negative = bitplanes.signs_of(signs)
    dense = torch.ones(40 if transpose else 70, 9)
    (out,), _ = run(simulator, "sign_matmul", positive, negative, dense, 70, transpose)
    bad = out.isnan().any(dim=1).nonzero().flatten().tolist()
    assert bad == [65 if transpose else 3]


# One launch that exercises each kernel: splits, both terms, both kinds of output.
CASES = {
    "shrink": lambda: (*shrink_operands(70, 520, 20, BF16), SCALING, 0.3, SEED),
    "shrink_group": lambda: (*group_operands(20, 1100, 20, 3, BF16), SCALING),
    "core_backward": lambda: core_backward_operands(260, 520, 8, BF16),
    "expand": lambda: (*expand_operands(70, 70, 77, 24, BF16), None, 0.3, SEED),
    "sign_gradient": lambda: gradient_operands(70, 70, 140, BF16, True),
    "sign_matmul": lambda: (*planes_of(70, 130)[1:], torch.ones(130, 20), 130, False),
}


@pytest.mark.parametrize("operation", CASES)
def test_any_order_of_blocks_and_warps_gives_the_same_bits(operation, simulator):
    """Random schedules, and copies that complete at once instead of at the wait."""
    arguments = CASES[operation]()
    first, launches = run(simulator, operation, *arguments, multiprocessors=8, check_overlap=True)
    splits = operation in ("shrink", "shrink_group", "core_backward")
    assert not splits or launches[0].grid[1] > 1, "no split"
    for options in ({"schedule_seed": 1}, {"schedule_seed": 2, "cp_async": "early"}):
        again, _ = run(simulator, operation, *arguments, multiprocessors=8, **options)
        assert all(map(same_bits, first, again)), options


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_that_are_not_aligned(dtype, simulator):
    """Rows at every alignment: 16 bytes, 4, and the odd 16-bit element; all but the first are
    copied."""
    M, n, r = 21, 70, 25
    for step, start in ((2, 5), (1, 2), (1, 0)):
        x, lora_A, lora_R = shrink_operands(2 * M, n + 10, r, dtype)
        x, lora_A = x[::step, start : start + n], lora_A[:, :n].T.contiguous().T
        check(simulator, "shrink", x, lora_A, lora_R.T, SCALING, 0.0, None)
        x, weight, p, factor = expand_operands(2 * M, 33, n + 10, r, dtype)
        x, weight = x[::step, start : start + n], weight[:, start : start + n]
        mixed = factor.T.contiguous().T
        check(simulator, "expand", x, weight, p[::step], mixed, None, 0.0, None)


@pytest.mark.parametrize(("M", "n", "dtype"), [(33, 48, BF16), (5, 100, FP32)])
def test_dropout_masks_are_those_of_the_seed_bit_for_bit(M, n, dtype, simulator):
    eye = torch.eye(n)
    mask = keep_mask(M, n, 0.4, SEED)
    ones = torch.ones(M, n, dtype=dtype)
    (h, _), _ = run(simulator, "shrink", ones, eye.to(dtype), eye, 1.0, 0.4, SEED)
    assert torch.equal(h != 0, mask)
    zeros = torch.zeros(M, 8, dtype=dtype), torch.zeros(n, 8, dtype=dtype)
    pair = torch.ones(M, 1, dtype=dtype), torch.ones(n, 1, dtype=dtype)
    (y,), _ = run(simulator, "expand", *zeros, *pair, None, 0.4, SEED)
    assert torch.equal(y != 0, mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_shows_where_it_belongs_and_nowhere_else(bad, simulator):
    x, lora_A, lora_R = shrink_operands(20, 300, 40, FP16)
    clean, _ = run(simulator, "shrink", x, lora_A, lora_R, SCALING, 0.0, None)
    x[2, 299] = bad
    non_finite, _ = run(simulator, "shrink", x, lora_A, lora_R, SCALING, 0.0, None)
    for out, before in zip(non_finite, clean, strict=True):
        assert not out[2].isfinite().any()
        out[2] = before[2]
        assert torch.equal(out, before)
    dy, x, _ = gradient_operands(9, 20, 37, BF16, False)
    dy[4, 3] = bad
    planes, _ = run(simulator, "sign_gradient", dy, x, None)
    elements = bitplanes.unpack(*planes, 37)
    assert elements[3].isnan().all()
    assert not elements.isnan().any(dim=1)[torch.arange(20) != 3].any()


def test_offsets_beyond_32_bits(simulator):
    stride = 2**31 + 8
    memory = torch.from_numpy(np.zeros(stride + 40, dtype=np.float16))
    x = memory.as_strided((2, 40), (stride, 1))  # untouched pages cost nothing
    small, lora_A, lora_R = shrink_operands(2, 40, 8, FP16)
    x.copy_(small)
    far, _ = run(simulator, "shrink", x, lora_A, lora_R, SCALING, 0.0, None)
    near, _ = run(simulator, "shrink", small, lora_A, lora_R, SCALING, 0.0, None)
    assert all(map(same_bits, far, near))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_layer_and_its_gradients(dropout, simulator, monkeypatch):
    """Forward and backward of the adapted linear, all operators together."""
    monkeypatch.setattr(layer, "resolve_backend", lambda backend, device, dtype: backend)
    x, weight, _, lora_B = expand_operands(19, 33, 40, 12, FP32)
    lora_A = normal(12, 40, dtype=FP32, device=CPU, seed=6) / math.sqrt(40)
    lora_R = normal(12, 12, dtype=FP32, device=CPU, seed=7)
    x.requires_grad_()
    lora_R.requires_grad_()
    dy = normal(19, 33, dtype=FP32, device=CPU, seed=8)
    factors = x, weight, lora_A, lora_R, lora_B, None
    torch.manual_seed(0)
    seed = new_seed(CPU)
    torch.manual_seed(0)  # the layer draws the same one
    with simulator.running():
        y = layer.lorasb_linear(*factors, SCALING, dropout, backend="cuda")
        found = y.detach(), *torch.autograd.grad(y, (x, lora_R), dy)
    expected = formulas.exact(formulas.lorasb_linear, *factors, dy, SCALING, dropout, seed)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_layer_without_a_core_trains_a_and_b(simulator, monkeypatch):
    """LoRA: the absent core is the identity, sign_accumulate computes the factors' gradients."""
    for module in (layer, sign_accumulate):
        monkeypatch.setattr(module, "resolve_backend", lambda backend, device, dtype: backend)
    x, weight, _, lora_B = expand_operands(19, 33, 40, 12, FP32)
    lora_A = normal(12, 40, dtype=FP32, device=CPU, seed=6) / math.sqrt(40)
    leaves = [tensor.requires_grad_() for tensor in (x, lora_A, lora_B)]
    dy = normal(19, 33, dtype=FP32, device=CPU, seed=8)
    with simulator.running():
        y = layer.lorasb_linear(x, weight, lora_A, None, lora_B, None, SCALING, backend="cuda")
        found = y.detach(), *torch.autograd.grad(y, leaves, dy)
    expected = formulas.exact(formulas.lora, x, weight, lora_A, lora_B, None, dy, SCALING)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
