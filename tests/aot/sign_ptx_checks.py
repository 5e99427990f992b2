"""The checks on emulated PTX; run by `run_checks.py` in a process without interpreter."""

import math

import torch

from lorasb_kernels.ops.triton.pack_signs import pack_signs
from lorasb_kernels.ops.triton.sign_matmul import sign_matmul
from lorasb_kernels.ops.triton.sign_tiles import sign_matmul_tile
from lorasb_kernels.ops.triton.weight_gradient import sign_accumulate, sign_gradient
from tests import formulas
from tests.aot.emulator import emulated, write_bytes
from tests.contract import assert_within_contract
from tests.ops.operands import normal, same_bits
from tests.ops.test_sign_accumulate import clear_signs, exact, operands
from tests.ops.test_sign_matmul import signs

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
OTHER_ORDERS = ({"schedule_seed": 1}, {"cp_async": "early"})

# tokens, m, n, dtype, weighted: several tiles and steps, divisible by 16, by 8 and not
CASES = [
    (150, 144, 208, BF16, False),
    (33, 37, 35, BF16, False),
    (70, 136, 72, BF16, True),
    (33, 20, 40, FP32, False),
]


def check_sign_accumulate(arch):
    for index, (tokens, m, n, dtype, weighted) in enumerate(CASES):
        dy, x, weight = operands(tokens, m, n, dtype, CPU, weighted)
        start = normal(m, n, dtype=FP32, device=CPU, seed=3)
        results = []
        for options in ({}, *OTHER_ORDERS[: 2 if index == 0 else 0]):
            acc = start.clone()
            with emulated(arch, **options) as log:
                sign_accumulate(acc, dy, x, weight)
            assert write_bytes(log) == 4 * m * n, "every element is written once"
            results.append(acc)
        eager = dy.float() if weight is None else dy.float() * weight[:, None]
        eager = start.addmm(eager.T, x.float())
        assert_within_contract(results[0], eager, start.double() + exact(dy, x, weight)[0])
        assert all(same_bits(results[0], other) for other in results[1:])


def check_sign_gradient(arch):
    for tokens, m, n, dtype, weighted in [*CASES[1:], (0, 5, 40, BF16, False)]:
        dy, x, weight = operands(tokens, m, n, dtype, CPU, weighted)
        with emulated(arch) as log:
            planes = sign_gradient(dy, x, weight)
        assert write_bytes(log) == 2 * planes[0].nbytes
        assert clear_signs(planes, dy, x, weight) >= 0.99 * m * n * (tokens > 0)

    # One shot and accumulated sum in the same order: the same signs, non-finite ones included.
    dy, x, _ = operands(150, 144, 208, BF16, CPU, False)
    dy[3, 7], x[5, 207] = math.nan, math.inf
    acc = torch.zeros(144, 208)
    with emulated(arch):
        sign_accumulate(acc, dy, x, None)
        one_shot, accumulated = sign_gradient(dy, x, None), pack_signs(acc)
    assert all(map(torch.equal, one_shot, accumulated))


def check_pack_signs(arch):
    for m, n in ((20, 300), (33, 64), (1, 1)):
        acc = normal(m, n + 3, dtype=FP32, device=CPU)[:, 3:]
        acc[:, ::7] = 0
        acc[0, 0], acc[-1, -1] = math.nan, -math.inf
        with emulated(arch) as log:
            planes = pack_signs(acc)
        assert all(map(torch.equal, planes, formulas.sign_planes(acc)))
        assert write_bytes(log) == 2 * planes[0].nbytes


def check_sign_matmul(arch):
    """Tiles of 32 rows (not on sm_90) and of 64; three bf16 terms are all of fp32."""
    for m, n, q, transpose, multiprocessors in (
        (100, 130, 80, False, 8),
        (70, 100, 5, True, 1),
        (70, 40, 170, False, 1),
        (33, 31, 20, True, 8),
    ):
        S = signs(m, n, CPU)
        S = S.T if transpose else S
        Z = normal(S.shape[1], q, dtype=FP32, device=CPU, seed=1)
        tall = sign_matmul_tile(arch, S.shape[0], q, multiprocessors).BLOCK_M == 64
        assert tall == (arch == "sm_90" or multiprocessors == 1)
        results = []
        for options in ({}, *OTHER_ORDERS[: 2 if q == 80 else 0]):
            with emulated(arch, multiprocessors, **options) as log:
                results.append(sign_matmul(S.positive, S.negative, Z, n, transpose))
            assert write_bytes(log) == 4 * S.shape[0] * q
        dense = S.to_dense()
        assert_within_contract(results[0], dense @ Z, dense.double() @ Z.double())
        assert all(same_bits(results[0], other) for other in results[1:])
