"""Tiles, splits, the route of `expand`, what is measured and how it is explained."""

import json

import pytest
import torch

import lorasb_kernels
from lorasb_kernels.ops import tune
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.triton import expand_route as route
from lorasb_kernels.ops.triton.tiles import (
    ARCHITECTURES,
    MULTIPROCESSORS,
    ExpandTile,
    column_splits,
    gradient_tile,
    projection_tile,
    rank_tiles,
    row_splits,
)

CPU = torch.device("cpu")
SHAPE = dict(
    arch="sm_86",
    dtype=torch.bfloat16,
    M=8000,
    N=4096,
    K=4096,
    r=90,
    transposed=False,
    dropout=False,
)
KEY = route.shape_key(torch.bfloat16, 8192, 4096, 4096, 96, False, False)
TILE = {"num_warps": 4, "num_stages": 3, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}


def tuning(**changes) -> dict:
    entry = {
        "two_call": {"microseconds": 2.0, "tile": TILE},
        "fused": {"microseconds": 1.0, "tile": TILE},
    }
    return {"format": 2, "arch": "sm_86", "expand": {KEY: entry}, **changes}


@pytest.fixture(autouse=True)
def forget():
    route.forget_tuning()
    yield
    route.forget_tuning()


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(tuning()))
    monkeypatch.setenv("LORASB_TUNING", str(path))
    return path


def test_a_rank_pays_for_itself_alone():
    for r in range(1, 513):
        width, tiles = rank_tiles(r)
        limit = 16 if r <= 16 else 31 + r if r <= 256 else 63 + r
        assert r <= width * tiles <= limit
    assert rank_tiles(96) == (32, 3)
    assert rank_tiles(24) == (32, 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_splits_cover_every_column_and_row_once(arch):
    for dtype in (torch.bfloat16, torch.float32):
        for M in (1, 33, 512, 5000, 70000):
            for n in (1, 63, 64, 200, 4096, 14336):
                tile = projection_tile(arch, dtype, 96, M, False)
                row_tiles = -(-M // tile.BLOCK_M)
                splits, steps = column_splits(row_tiles, n, 96, tile, MULTIPROCESSORS[arch])
                columns = steps * tile.BLOCK_K
                assert (splits - 1) * columns < n <= splits * columns
                resident = MULTIPROCESSORS[arch] * tile.blocks_per_sm
                assert splits == 1 or row_tiles < resident
            splits, rows = row_splits(M, gradient_tile(arch, dtype))
            assert (splits - 1) * rows < M <= splits * rows
            assert splits <= 32


def test_unmeasured_shapes_take_two_calls():
    chosen = route.plan_route(**SHAPE)
    assert chosen.name == "two_call"
    assert "not measured on sm_86" in chosen.reason


def test_a_measured_shape_takes_the_faster_route(file):
    chosen = route.plan_route(**SHAPE)
    assert chosen.name == "fused"
    assert chosen.tile == ExpandTile(**TILE)
    assert chosen.reason == "measured (tuning.json): two_call 2.0 µs, fused 1.0 µs"
    assert route.plan_route(**{**SHAPE, "M": 8193}).name == "two_call"
    assert route.plan_route(**{**SHAPE, "dropout": True}).name == "two_call"
    assert route.plan_route(**{**SHAPE, "arch": "sm_80"}).name == "two_call"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a tuning file"),
        ("[]", "not a tuning file"),
        (json.dumps(tuning(format=1)), "format is 1; expected 2"),
        (json.dumps(tuning(expand={KEY: {"guess": {}}})), "route of .* 'guess'"),
        (json.dumps(tuning(expand={KEY: {"fused": {"tile": {}}}})), "not a tuning file"),
        (json.dumps(tuning(expand={KEY: {}})), "expected two_call and fused"),
    ],
)
def test_a_damaged_tuning_file_is_named(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        route.plan_route(**SHAPE)
    assert "tuning.json" in str(error.value)


def test_a_missing_tuning_file_is_named(file):
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"LORASB_TUNING is .*tuning\.json"):
        route.plan_route(**SHAPE)


@pytest.mark.parametrize("transposed", [False, True])
def test_measuring_keeps_the_fastest_tile_of_each_route(transposed, monkeypatch):
    """The times are invented; the operands and the routes are real, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the device measures by itself")
    times = iter([2.0, 5.0, 3.0, 7.0, 4.0])

    def timed(function):
        assert function().isfinite().all()
        return next(times)

    small, wide = ExpandTile(4, 2, 16, 16, 16), ExpandTile(4, 2, 16, 32, 32)
    monkeypatch.setattr(tune, "_microseconds", timed)
    monkeypatch.setitem(tune.EXPAND_CANDIDATES, 4, (small,))
    monkeypatch.setattr(tune, "descriptor_candidates", lambda *_: (small, wide))
    layer = LayerShape(M=20, m=24, n=40, r=4, dropout=0.1)
    key, entry = tune.measure(layer, transposed, torch.float32, CPU)
    assert {name: route["microseconds"] for name, route in entry.items()} == {
        "two_call": 2.0,
        "fused": 3.0,
        "fused_descriptor": 4.0,
    }
    assert ExpandTile(**json.loads(json.dumps(entry["fused"]["tile"]))) == small
    assert ExpandTile(**entry["fused_descriptor"]["tile"]) == wide
    N, K = (40, 24) if transposed else (24, 40)
    assert key == route.shape_key(torch.float32, 20, N, K, 4, transposed, transposed)


def test_tensor_maps_are_measured_where_they_can_be_made(monkeypatch):
    monkeypatch.setattr(tune, "_microseconds", lambda function: 1.0)
    monkeypatch.setattr(tune, "descriptor_candidates", lambda *_: (ExpandTile(4, 2, 16, 16, 16),))
    for n, r, measured in ((40, 4, True), (40, 3, False), (39, 4, False)):
        layer = LayerShape(M=20, m=24, n=n, r=r)
        _, entry = tune.measure(layer, True, torch.float32, CPU)
        assert ("fused_descriptor" in entry) == measured


def test_tuning_needs_a_gpu(tmp_path):
    with pytest.raises(RuntimeError, match="device is cpu; expected a CUDA device"):
        tune.tune([], tmp_path / "t.json", device="cpu")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_on_the_device(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    measured = tune.tune([LayerShape(256, 512, 256, 32)], path)
    monkeypatch.setenv("LORASB_TUNING", str(path))
    route.forget_tuning()
    assert len(measured) == 2
    steps = lorasb_kernels.explain((512, 256, 32), tokens=256, backend="triton").steps
    assert next(s.reason for s in steps if s.operation == "expand").startswith("measured")


def test_explain_a_shape_for_an_architecture(file):
    text = str(lorasb_kernels.explain((4096, 4096, 96), tokens=8192, arch="sm_86"))
    assert "backend triton: planned for sm_86" in text
    assert "shrink: projection kernel [64×64, 4 warps, 3 stages] (rank 96 as 3 tiles of 32" in text
    assert "expand: fused [64×64×32, 4 warps, 3 stages] (measured" in text
    assert "dx: two_call (not measured" in text
    split = lorasb_kernels.explain((4096, 4096, 96), tokens=64, arch="sm_86").steps[0]
    assert "split 8 ways" in split.reason


def test_explain_a_layer_here():
    layer = lorasb_kernels.LoRASBLinear(24, 16, 4, backend="reference")
    assert str(lorasb_kernels.explain(layer)) == "backend reference: asked for by name"
    layer.backend = "auto"
    assert lorasb_kernels.explain(layer).backend == (
        "reference" if layer.weight.device.type == "cpu" else "triton"
    )
    with pytest.raises(TypeError, match="layer_or_shape is 'q_proj'; expected a layer or"):
        lorasb_kernels.explain("q_proj")
    with pytest.raises(ValueError, match="arch is 'sm_70'; expected one of"):
        lorasb_kernels.explain((8, 8, 2), arch="sm_70")
