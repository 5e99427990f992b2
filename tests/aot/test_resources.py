"""The resources that the kernels use on each architecture, from ahead-of-time compilation.

Every shipped tile must fit its device, spill nothing, use the tensor cores and copy 16 bytes
at a time. The default run takes every tile of sm_86 in bf16 and one rank of the others.
"""

import json
import re

import pytest
import torch

from lorasb_kernels.ops.triton.projection_tiles import projection_tile
from lorasb_kernels.ops.triton.tiles import (
    ARCHITECTURES,
    descriptor_candidates,
    rank_tiles,
    resident_blocks,
)
from tests.aot.process import run_compiling

KERNELS = ("projection", "gradient", "expand", "factor_gradient")
KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
WITH_TENSOR_MAPS = {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}


def reports(*arguments: str) -> list[dict]:
    return json.loads(run_compiling("bench.kernel_resources.report", "--json", *arguments))


def rank_of(report: dict) -> int:
    found = re.match(r"r=(\d+)", report["case"])
    return int(found[1]) if found else 0


def assert_fits(report: dict) -> None:
    assert report["stack"] == 0, report
    assert report["registers"] <= 255, report
    assert 0 < report["shared"] <= 1024 * KB[report["arch"]], report
    assert report["blocks_per_sm"] >= 1, report
    assert report["tensor_core"], report
    if report["wgmma_products"]:
        assert report["wgmma_waits"] < report["wgmma_products"], "a wait behind every product"
    if report["kernel"] == "expand_descriptor":
        assert report["tensor_core"] == WITH_TENSOR_MAPS[report["arch"]], report
        assert report["tensor_map_copies"] > 0, report
        assert report["copies_of_16_bytes"] + report["narrower_copies"] == 0, report
        return
    assert report["copies_of_16_bytes"] > 0, report
    if report["kernel"] == "gradient" and report["dtype"] != "float32":
        # Both operands are in flight: [64, width] of 16 bits, 128 threads, 4 stages or 5.
        width = int(report["case"].removeprefix("width="))
        assert report["copies_of_16_bytes"] >= 4 * 2 * (64 * width * 2) // (16 * 128), report
    # Past rank 256 a step of x is 2 KB, 8 bytes per thread; the wide operand is A.
    if rank_of(report) <= 256:
        assert report["narrower_copies"] == 0, report


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("projection", "r=(16|32|64|96|128), split, dropout"),
        ("projection", "r=(96|128)"),
        ("projection", "r=96, split, 3 layers"),
        ("projection", "r=(192|224|256), split, dropout"),
        ("projection", "r=512, split, dropout"),
        ("gradient", ".*"),
        ("expand", ".*"),
        ("factor_gradient", "r=(64|96|512)|r=(96|256), split, dropout"),
    ],
)
def test_sm_86_in_bf16(kernel, case):
    found = reports("--arch", "sm_86", "--dtype", "bfloat16", "--kernel", kernel, "--case", case)
    assert found
    for report in found:
        assert_fits(report)


@pytest.mark.parametrize(
    "cases",
    [
        r"r=(16|32|96|128|160|256)",
        pytest.param(r"r=\d+", marks=pytest.mark.slow),
    ],
)
def test_the_projection_computes_every_product_once(cases):
    """A step of 64×64 by r = 96 is 192 products of 16×8×16: 48 for each of four warps."""
    flags = ("--arch", "sm_86", "--dtype", "bfloat16", "--kernel", "projection")
    for report in reports(*flags, "--case", cases):
        r = rank_of(report)
        tile = projection_tile("sm_86", torch.bfloat16, r, 8191, False)
        width, tiles = rank_tiles(r)
        products = tile.BLOCK_M // 16 * tile.BLOCK_K // 16 * width * tiles // 8
        assert report["products_of_16_bits"] == products // tile.num_warps, report
        assert report["blocks_per_sm"] >= tile.blocks_per_sm, report


def test_rows_of_8_elements_more_than_a_multiple_of_16_are_copied_16_bytes_at_a_time():
    kernels = ("--kernel", "projection", "expand")
    flags = ("--dtype", "bfloat16", *kernels, "--case", "r=24.*|.*odd multiples of 8")
    for report in reports("--arch", "sm_86", *flags):
        assert_fits(report)


def test_a_mask_on_sm_90_serializes_no_products():
    """Up to rank 128 mma.sync, which reads the masked registers itself."""
    flags = ("--arch", "sm_90", "--dtype", "bfloat16", "--kernel", "projection")
    for report in reports(*flags, "--case", "r=(16|96|128), split, dropout"):
        assert_fits(report)
        assert report["tensor_core"] == "mma", report
        tile = projection_tile("sm_90", torch.bfloat16, rank_of(report), 511, True)
        assert report["blocks_per_sm"] >= tile.blocks_per_sm


def test_the_tall_tiles_of_sm_90_share_a_multiprocessor():
    flags = ("--arch", "sm_90", "--dtype", "bfloat16", "--kernel", "projection")
    for report in reports(*flags, "--case", "r=96(, split, tall)?"):
        assert_fits(report)
        assert report["tensor_core"] == "wgmma"
        assert report["blocks_per_sm"] == 2


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "sm_86"])
def test_one_of_each_kernel_elsewhere(arch):
    cases = "r=96, split|width=32|forward"
    found = reports("--arch", arch, "--dtype", "bfloat16", "--kernel", *KERNELS, "--case", cases)
    assert {report["kernel"] for report in found} == set(KERNELS)
    for report in found:
        assert_fits(report)
        # wgmma multiplies at least 64 rows; in the tiles of these two kernels the rank gives the
        # rows.
        if arch == "sm_90" and report["kernel"] not in ("gradient", "factor_gradient"):
            assert report["tensor_core"] == "wgmma", report


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_tensor_maps(arch):
    kernel = ("--kernel", "expand_descriptor", "--case", "forward|dx, dropout")
    found = reports("--arch", arch, "--dtype", "bfloat16", *kernel)
    assert len(found) == {"sm_90": 6, "sm_100": 5, "sm_120": 4}[arch], "every tile that is measured"
    tiles = {str(tile): tile for tile in descriptor_candidates(arch, torch.bfloat16, False)}
    for report in found:
        assert_fits(report)
        if report["case"] == "forward":  # as many blocks are launched as the device holds
            blocks = resident_blocks(tiles[report["tile"]], torch.bfloat16, arch, 1)
            assert blocks == report["blocks_per_sm"], report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_tile_and_dtype(arch, dtype):
    for report in reports(
        "--arch", arch, "--dtype", dtype, "--kernel", *KERNELS, "expand_descriptor"
    ):
        assert_fits(report)
