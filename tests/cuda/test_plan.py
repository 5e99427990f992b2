"""How the projection distributes a shape over blocks, without running it."""

import re

import pytest
import torch

from tests.cuda.test_operators import BF16, SCALING

A6000, H100 = 84, 132  # multiprocessors


def grid_of(simulator, multiprocessors, M, n, r, layers=1) -> tuple[int, int]:
    """Row tiles of all layers, and blocks of each: from the message of a launch that is refused."""
    x = torch.zeros(1, n, dtype=BF16).expand(M, n)
    As, Rs = [torch.zeros(r, n, dtype=BF16)] * layers, [torch.zeros(r, r)] * layers
    with (
        simulator.running(multiprocessors, refuse=True),
        pytest.raises(RuntimeError, match="failed to launch") as refused,
    ):
        torch.ops.lorasb.shrink_group_cuda(x, As, Rs, SCALING)
    tiles, splits = re.search(r"grid (\d+)×(\d+)×1", str(refused.value)).groups()
    return int(tiles), int(splits)


@pytest.mark.parametrize("multiprocessors", [A6000, H100])
@pytest.mark.parametrize("r", [16, 96])
@pytest.mark.parametrize("n", [4096, 14336])
def test_tiles_follow_the_rows_and_splits_fill_the_device(n, r, multiprocessors, simulator):
    for M in (1, 16, 100, 512, 2048, 5377, 8192, 10752, 65536):
        tiles, splits = grid_of(simulator, multiprocessors, M, n, r)
        tall, short = -(-M // 128), -(-M // 32)
        assert tiles in (tall, short)
        if M <= 100:
            assert tiles == short, "few rows take the short tile"
        if M <= 512:
            assert splits > 1, "and the columns are split"
        if M >= 8192 and r == 96:
            assert tiles == tall, "many rows read A less often in tall tiles"
        if 256 * multiprocessors <= M:
            assert splits == 1, "two blocks for each multiprocessor without a split"
        # Of the blocks that are resident at a time, two of the tall tile, three of the short one.
        resident = multiprocessors * (2 if tiles == tall else 3)
        assert splits == 1 or tiles * (splits - 1) < resident


def test_a_group_is_split_as_one_product_of_as_many_tiles(simulator):
    alone = grid_of(simulator, A6000, 64, 4096, 32)
    together = grid_of(simulator, A6000, 64, 4096, 32, layers=3)
    assert together[0] == 3 * alone[0]
    assert together[1] < alone[1]
