"""`sign_gradient`: the signs in one shot, those of the accumulated sum; non-finite input."""

import math

import pytest
import torch

from lorasb_kernels.functional import pack_signs, sign_accumulate_, sign_gradient
from lorasb_kernels.ops.bitplanes import unpack
from tests.ops.test_sign_accumulate import SHAPES, clear_signs, operands


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "m", "n"), SHAPES)
def test_one_shot_signs(tokens, m, n, weighted, backend, dtype, device):
    dy, x, weight = operands(tokens, m, n, dtype, device, weighted)
    planes = sign_gradient(dy, x, weight, backend=backend)
    assert clear_signs(planes, dy, x, weight) >= 0.99 * m * n * (tokens > 0)
    assert tokens > 0 or not any(plane.any() for plane in planes)
    padded = unpack(*(plane.cpu() for plane in planes), planes[0].shape[1] * 32)
    assert not padded[:, n:].any()


def test_one_shot_equals_accumulated(backend, device):
    """The same sum in the same order: the same signs, also where rounding decides."""
    dy, x, _ = operands(50, 33, 70, torch.float32, device, False)
    acc = sign_accumulate_(torch.zeros(33, 70, device=device), dy, x, backend=backend)
    for one, other in zip(
        sign_gradient(dy, x, backend=backend), pack_signs(acc, backend=backend), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_sets_both_bits(bad, backend, device):
    """In its row or column and nowhere else, padding included."""
    dy, x, _ = operands(20, 34, 70, torch.float16, device, False)
    clean = sign_gradient(dy, x, backend=backend)
    dy[3, 33] = bad
    positive, negative = sign_gradient(dy, x, backend=backend)
    full = pack_signs(torch.ones(1, 70, device=device))[0][0]
    assert torch.equal(positive[33], full)
    assert torch.equal(negative[33], full)
    assert torch.equal(positive[:33], clean[0][:33])
    assert torch.equal(negative[:33], clean[1][:33])
    acc = torch.zeros(34, 70, device=device)
    sign_accumulate_(acc, dy, x, backend=backend)
    assert not acc[33].isfinite().any()
    assert acc[:33].isfinite().all()
