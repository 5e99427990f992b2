"""The rule for unmeasured shapes: pure, the same for a class of shapes, and the model's choice."""

import pytest
import torch

from lorasb_kernels.hardware.gpus import GPUS, OF_ARCHITECTURE
from lorasb_kernels.ops.triton import route_rule
from lorasb_kernels.ops.triton.route_decision import Shape, rounded_rows
from lorasb_kernels.ops.triton.route_files import ROUTES
from lorasb_kernels.ops.triton.route_rule import (
    MARGIN,
    fused_limits,
    fused_tiles,
    two_call_limits,
    unmeasured_route,
)
from lorasb_kernels.ops.triton.tiles import ARCHITECTURES, expand_tile

BF16 = torch.bfloat16
SIZES = [(M, N, K) for M in (256, 2048, 8192) for N in (576, 4096) for K in (576, 1024, 14336)]


def predicted(arch, M, N, K, r, transposed=False):
    """Seconds of the two calls, and of each fused route and tile."""
    gpu = GPUS[OF_ARCHITECTURE[arch]]
    fused = {
        (name, tile): found.total
        for name, tiles in fused_tiles(arch, BF16, True)
        for tile in tiles
        if (found := fused_limits(gpu, arch, M, N, K, r, transposed, name, tile)) is not None
    }
    return two_call_limits(gpu, M, N, K, r).total, fused


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(OF_ARCHITECTURE)))
def test_an_architecture_without_counts_takes_two_calls(arch):
    rule = unmeasured_route(arch, BF16, 256, 4096, 576, 96, False, False)
    assert (rule.name, rule.reason) == ("two_call", f"no kernel was counted on {arch}")


@pytest.mark.parametrize("arch", OF_ARCHITECTURE)
def test_the_fastest_fused_tile_is_taken_where_it_wins_by_the_margin(arch):
    taken = set()
    for M, N, K in SIZES:
        rule = unmeasured_route(arch, BF16, M, N, K, 96, False, False)
        two, fused = predicted(arch, M, N, K, 96)
        fastest = min(fused, key=fused.get)
        if fused[fastest] < (1 - MARGIN) * two:
            assert (rule.name, rule.tile) == fastest
        else:
            assert (rule.name, rule.tile) == ("two_call", expand_tile(arch, BF16, False))
        assert rule.name in ROUTES
        assert "predicted for" in rule.reason
        taken.add(rule.name)
    assert "two_call" in taken
    assert len(taken) > 1, "else there is no need for a model"


def test_long_contractions_stay_with_the_vendor_and_short_ones_do_not():
    route = {
        K: unmeasured_route("sm_86", BF16, 1024, 1536, K, 16, False, False).name
        for K in (576, 4096, 14336)
    }
    assert route == {576: "fused", 4096: "two_call", 14336: "two_call"}


def test_shapes_of_a_class_take_one_route():
    for M, r in ((4097, 72), (5000, 88), (8192, 96)):
        keys = {
            Shape(BF16, rounded_rows(rows), 576, 576, rank, False, False).key
            for rows, rank in ((M, r), (8192, 96))
        }
        assert len(keys) == 1
        assert unmeasured_route("sm_86", BF16, M, 576, 576, r, False, False) == unmeasured_route(
            "sm_86", BF16, 8192, 576, 576, 96, False, False
        )


@pytest.mark.parametrize(
    ("dtype", "dropout", "M"), [(torch.float32, False, 8), (BF16, True, 8), (BF16, False, 0)]
)
def test_what_was_not_counted_takes_two_calls(dtype, dropout, M):
    rule = unmeasured_route("sm_86", dtype, M, 576, 576, 16, False, dropout)
    assert rule.name == "two_call"
    assert rule.tile == expand_tile("sm_86", dtype, dropout)


def test_tensor_maps_only_where_the_operands_allow_them():
    sizes = dict(arch="sm_90", dtype=BF16, M=1024, N=4096, K=1024, transposed=False, dropout=False)
    assert unmeasured_route(**sizes, r=16).name == "fused_descriptor"
    assert unmeasured_route(**sizes, r=16, aligned=False).name != "fused_descriptor"
    assert unmeasured_route(**{**sizes, "K": 1020}, r=16).name != "fused_descriptor"


def test_no_device_is_asked_and_a_class_is_decided_once(monkeypatch):
    def asked(*arguments):
        raise AssertionError("a device was asked")

    for name in ("is_available", "get_device_properties", "get_device_capability", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked)
    unmeasured_route.cache_clear()
    for _ in range(3):
        unmeasured_route("sm_80", BF16, 300, 600, 700, 24, True, False)
    assert unmeasured_route.cache_info().hits == 2
    assert route_rule.MARGIN == 0.10
