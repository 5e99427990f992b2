"""The shipped counts: of every kernel and tile in the tables, and what the formulas say."""

import json
import math
import re

import pytest

from lorasb_kernels.hardware.counts import PATH, counts_of
from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.ops.triton.tiles import EXPAND_BLOCK_R, rank_tiles
from lorasb_kernels.profiling.layer_time import fused, projection, rank_gradient, routes_of

ENTRIES = json.loads(PATH.read_text())["counts"]


@pytest.mark.parametrize("arch", ENTRIES)
def test_a_step_of_the_frozen_product_multiplies_its_tile_once(arch):
    found = 0
    for name, entry in ENTRIES[arch].items():
        kernel, _, tile = name.split(" | ")
        if kernel in ("expand", "expand_descriptor"):
            rows, columns, depth = map(int, re.match(r"(\d+)×(\d+)×(\d+)", tile).groups())
            loops = [loop for loop in entry["loops"] if loop[0]]
            if kernel == "expand":
                rank_loop, *loops = loops
                assert rank_loop[0] == 2 * rows * columns * EXPAND_BLOCK_R, name
            (main_loop,) = loops
            assert main_loop[0] == 2 * rows * columns * depth, name
            assert entry["once"][0] == 0
            found += 1
    assert found >= 10


@pytest.mark.parametrize("arch", ENTRIES)
def test_a_step_of_the_projection_multiplies_its_tile_once(arch):
    for name, entry in ENTRIES[arch].items():
        kernel, case, tile = name.split(" | ")
        if kernel == "projection":
            rows, depth = map(int, re.match(r"(\d+)×(\d+)", tile).groups())
            padded = math.prod(rank_tiles(int(re.match(r"r=(\d+)", case).group(1))))
            first = next(loop for loop in entry["loops"] if loop[0])
            least = 2 * rows * depth * padded
            # Two warps compute the same product where there are more warps than rows for them.
            assert first[0] in (least, 2 * least, 4 * least), name
            once = padded <= 160 and arch != "sm_90"
            assert first[0] == least or not once, name


@pytest.mark.parametrize("key", GPUS)
@pytest.mark.parametrize("r", [1, 16, 96, 100, 300, 512])
def test_every_launch_of_a_layer_can_be_predicted(key, r):
    gpu = GPUS[key]
    for M in (1, 300, 5000, 70000):
        for layers in (1, 2, 3):
            assert all(launch.limits.total > 0 for launch in projection(gpu, M, 4096, r, layers))
        assert all(launch.limits.total > 0 for launch in rank_gradient(gpu, M, r))
        for route in {"fused", "fused_descriptor"} & set(routes_of(gpu)):
            for transposed in (False, True):
                assert fused(gpu, M, 4096, 1024, r, transposed, route)


def test_a_kernel_that_was_not_counted_is_none():
    assert counts_of("sm_86", "expand", "forward", "no such tile") is None
    assert counts_of("sm_70", "expand", "forward", "") is None
