"""`sign_gradient` and `sign_accumulate` on Hopper, executed as sm_90a PTX."""

import math
import re

import pytest
import torch

from lorasb_kernels.ops import bitplanes
from tests.contract import assert_within_contract
from tests.cuda.test_hopper import HOPPER, padded
from tests.cuda.test_operators import (
    BF16,
    CPU,
    FP16,
    FP32,
    eager,
    gradient_operands,
    normal,
    oracle,
    run,
)
from tests.ops.operands import same_bits


def operands(M, m, n, dtype):
    """Gradient and input, rows at multiples of 16 bytes."""
    dy, x, _ = gradient_operands(M, m, n, dtype, False)
    return padded(dy), padded(x)


def is_hopper(launch) -> bool:
    return "hopper_sign_gradient_kernel" in launch.kernel


def accumulated(simulator, start, dy, x, **options):
    acc = start.clone()
    with simulator.running(capability=HOPPER, **options) as launches:
        torch.ops.lorasb.sign_accumulate_cuda(acc, dy, x, None)
    return acc, launches


# Tails in tokens, rows and columns; several tiles per block; fewer rows than a block has.
SHAPES = [(130, 264, 300, 2), (70, 40, 36, 2), (200, 513, 264, 4)]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("M", "m", "n", "multiprocessors"), SHAPES)
def test_sums_are_added(M, m, n, multiprocessors, dtype, simulator):
    dy, x = operands(M, m, n, dtype)
    start = normal(m, n, dtype=FP32, device=CPU, seed=5)
    acc, (launch,) = accumulated(simulator, start, dy, x, multiprocessors=multiprocessors)
    assert is_hopper(launch)
    assert not launch.stats.notes
    (yardstick,) = eager("sign_accumulate", start, dy, x, None)
    (exact,) = oracle("sign_accumulate", start, dy, x, None)
    assert_within_contract(acc, yardstick, exact, name="acc")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("M", "m", "n", "multiprocessors"), SHAPES)
def test_signs(M, m, n, multiprocessors, dtype, simulator):
    dy, x = operands(M, m, n, dtype)
    device = {"capability": HOPPER, "multiprocessors": multiprocessors, "check_overlap": True}
    (positive, negative), (launch,) = run(simulator, "sign_gradient", dy, x, None, **device)
    assert is_hopper(launch)
    assert not launch.stats.notes
    (exact,) = oracle("sign_accumulate", torch.zeros(m, n), dy, x, None)
    clear = exact.abs() > 1e-5 * exact.abs().max()
    assert clear.float().mean() > 0.99
    signs = bitplanes.unpack(positive, negative, 32 * positive.shape[1])
    assert torch.equal(signs[:, :n][clear], exact.sign().float()[clear])
    assert not (signs[:, n:] != 0).any()


def test_a_part_of_a_larger_accumulator(simulator):
    dy, x = operands(70, 40, 36, BF16)
    whole = torch.full((50, 64), math.nan)
    whole[8:48, 16:52] = 1
    with simulator.running(capability=HOPPER) as launches:
        torch.ops.lorasb.sign_accumulate_cuda(whole[8:48, 16:52], dy, x, None)
    assert is_hopper(launches[0])
    near, _ = accumulated(simulator, torch.ones(40, 36), dy, x)
    assert same_bits(whole[8:48, 16:52].contiguous(), near)
    whole[8:48, 16:52] = math.nan
    assert whole.isnan().all()


def test_any_schedule_gives_the_same_bits(simulator):
    """Each sum is added once, by whichever block."""
    dy, x = operands(130, 140, 264, BF16)
    start = normal(140, 264, dtype=FP32, device=CPU, seed=5)
    first, _ = accumulated(simulator, start, dy, x, multiprocessors=4)
    planes, _ = run(simulator, "sign_gradient", dy, x, None, capability=HOPPER)
    for options in ({"schedule_seed": 1}, {"cp_async": "early"}, {"cp_async": "late"}):
        assert same_bits(first, accumulated(simulator, start, dy, x, **options)[0]), options
        again, _ = run(simulator, "sign_gradient", dy, x, None, capability=HOPPER, **options)
        assert all(map(same_bits, planes, again)), options


def test_non_finite_gradients_are_no_signs_in_their_rows(simulator):
    dy, x = operands(70, 140, 36, BF16)
    dy[4, 133] = math.nan
    planes, (launch,) = run(simulator, "sign_gradient", dy, x, None, capability=HOPPER)
    assert is_hopper(launch)
    signs = bitplanes.unpack(*planes, 64)
    assert signs[133, :36].isnan().all()
    assert torch.equal(signs[133, 36:], torch.zeros(28))
    assert not signs[torch.arange(140) != 133].isnan().any()


@pytest.mark.parametrize(
    ("change", "capability"),
    [
        (lambda dy, x, acc: (dy, x, acc), (8, 6)),
        (lambda dy, x, acc: (dy, x, acc), (10, 0)),
        (lambda dy, x, acc: (dy.float(), x.float(), acc), HOPPER),
        (lambda dy, x, acc: (dy[:0], x[:0], acc), HOPPER),
        (lambda dy, x, acc: (dy, x, acc[:, 1:33]), HOPPER),
        (lambda dy, x, acc: (dy, x, acc.view(-1)[: 16 * 33].view(16, 33)[:, :32]), HOPPER),
    ],
)
def test_other_operands_and_devices_take_the_other_kernel(change, capability, simulator):
    dy, x, acc = change(*operands(40, 16, 32, BF16), torch.zeros(16, 36))
    acc = acc if acc.shape[1] == 32 else acc[:, :32]
    with simulator.running(capability=capability) as launches:
        torch.ops.lorasb.sign_accumulate_cuda(acc, dy, x, None)
    assert launches
    assert not any(map(is_hopper, launches))
    (exact,) = oracle("sign_accumulate", torch.zeros(16, 32), dy, x, None)
    torch.testing.assert_close(acc.double(), exact, rtol=1e-3, atol=1e-3)


# An edit of the PTX of the kernel that adds, and what becomes of it.
FAULTS = {
    "none": (r"$^", "", "right"),
    "a slice is overwritten while it is added": (
        r"cp\.async\.bulk\.wait_group\.read 1;",
        "",
        "RaceError",
    ),
    "no fence between stores and their addition": (r"fence\.proxy\.async\S+", "", "RaceError"),
    "rows in another order of chunks": (
        r"(and\.b32 \s*%r\d+, %r\d+), 112;",
        r"\1, 48;",
        "UninitializedRead",
    ),
    "sums are stored, not added": (
        r"cp\.reduce(\.async\.bulk\.tensor\.2d\.global\.shared::cta)\.add\.tile",
        r"cp\1",
        "wrong result",
    ),
    "a stage is released before it was read": (
        r"(wgmma\.wait_group\S+) 1;",
        r"\1 2;",
        "RaceError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, simulator, monkeypatch):
    pattern, new, expected = FAULTS[fault]
    (name,) = (
        name
        for name in simulator._texts
        if re.search("hopper_sign_gradient_kernel.*bfloat16Lb1E", name)
    )
    text, count = re.subn(pattern, new, simulator._texts[name])
    assert count or fault == "none"
    monkeypatch.setitem(simulator._texts, name, text)
    assert outcome(simulator) == expected


def outcome(simulator) -> str:
    """What becomes of an addition: the name of the error, "wrong result" or "right"."""
    dy, x = operands(400, 300, 136, BF16)
    start = normal(300, 136, dtype=FP32, device=CPU, seed=5)
    try:
        acc, (launch,) = accumulated(simulator, start, dy, x)
    except Exception as error:
        return type(error).__name__
    assert is_hopper(launch)
    arguments = (start, dy, x, None)
    try:
        assert_within_contract(
            acc, *eager("sign_accumulate", *arguments), *oracle("sign_accumulate", *arguments)
        )
    except AssertionError:
        return "wrong result"
    return "right"
