"""Tiles, splits, the planned route of `expand` and how it is explained."""

import pytest
import torch

import lorasb_kernels
from lorasb_kernels.ops.triton import expand_route as route
from lorasb_kernels.ops.triton import route_measuring
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.projection_tiles import column_splits, projection_tile
from lorasb_kernels.ops.triton.route_decision import Shape
from lorasb_kernels.ops.triton.route_files import RouteFile
from lorasb_kernels.ops.triton.route_measuring import candidates
from lorasb_kernels.ops.triton.tiles import (
    ARCHITECTURES,
    MULTIPROCESSORS,
    ExpandTile,
    gradient_tile,
    rank_tiles,
    row_splits,
)
from tests.ops.triton.routes import MEASURED_ON, TILE, StubTimer, device_file, entry, operands

SHAPE = Shape(torch.bfloat16, 8192, 4096, 4096, 88, transposed=False, dropout=False)


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    for name in ("LORASB_TUNING", "LORASB_TUNE"):
        monkeypatch.delenv(name, raising=False)
    torch.use_deterministic_algorithms(False)  # the other tests' setting
    route.forget_routes()
    yield
    route.forget_routes()


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    found = {SHAPE.key: entry(two_call=2.0, fused=1.0)}
    path.write_text(RouteFile("sm_86", MEASURED_ON, found).text())
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


def test_unmeasured_shapes_follow_the_rule():
    chosen = route.plan_route("sm_86", SHAPE)
    assert chosen.name == "two_call"
    assert chosen.reason.startswith("not measured on sm_86; by the rule: ")


def test_a_measured_shape_takes_the_faster_route(file):
    chosen = route.plan_route("sm_86", SHAPE)
    assert (chosen.name, chosen.tile) == ("fused", TILE)
    assert chosen.reason == (
        "measured on 2026-01-02 at M = 8000 (tuning.json): two_call 2.0 µs, fused 1.0 µs"
    )
    assert route.plan_route("sm_86", SHAPE._replace(r=96)).name == "fused"
    for other in (SHAPE._replace(rows=16384), SHAPE._replace(dropout=True)):
        assert "by the rule" in route.plan_route("sm_86", other).reason
    assert "by the rule" in route.plan_route("sm_80", SHAPE).reason


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_tried_first_is_little_and_what_cannot_fit_is_not_tried(arch, dtype):
    first = candidates(arch, dtype, dropout=False, described=True)
    every = candidates(arch, dtype, dropout=False, described=True, all_tiles=True)
    assert len(first) <= 1 + 2 * route_measuring.SHORT_LIST
    assert set(first) <= set(every)
    assert {name for name, _ in first} == {name for name, _ in every}
    assert ("fused_descriptor" in dict(first)) == (arch in ("sm_90", "sm_100", "sm_120"))
    too_large = ExpandTile(8, 4, 128, 256, 64)  # four stages of 48 KB, three of them in memory
    fits = arch in ("sm_80", "sm_90", "sm_100") and dtype == torch.bfloat16
    assert (too_large in [tile for _, tile in every]) == fits


def on_the_cpu_as_if(arch, timer, monkeypatch):
    """`expand`'s choice on the CPU, as on a device of an architecture whose times are known."""
    kept = device_file(arch)
    monkeypatch.setattr(route, "architecture", lambda device: arch)
    monkeypatch.setattr(route, "device_file", lambda device: kept)
    decide = route.decide
    monkeypatch.setattr(route, "decide", lambda *arguments, store: decide(*arguments, timer, store))


def test_a_process_decides_once(monkeypatch):
    """Whatever becomes of the file and of the setting."""
    timer = StubTimer("fused")
    on_the_cpu_as_if("sm_86", timer, monkeypatch)
    assert route.choose_route(*operands(20), RUN).name == "fused"
    device_file().path.unlink()
    monkeypatch.setenv("LORASB_TUNE", "off")
    assert route.choose_route(*operands(17), RUN).name == "fused"
    assert timer.calls == 1


def test_what_the_rule_decided_stays_in_the_process(monkeypatch):
    timer = StubTimer("fused")
    on_the_cpu_as_if("sm_86", timer, monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        first = route.choose_route(*operands(20), RUN)
    finally:
        torch.use_deterministic_algorithms(False)
    assert route.choose_route(*operands(20), RUN) is first
    assert timer.calls == 0


def test_no_rows_are_not_measured(monkeypatch):
    timer = StubTimer("fused")
    on_the_cpu_as_if("sm_86", timer, monkeypatch)
    x, weight, p, *rest = operands(20)
    assert "no rows" in route.choose_route(x[:0], weight, p[:0], *rest, RUN).reason
    assert route.choose_route(x[:1], weight, p[:1], *rest, RUN).name == "fused"
    assert timer.calls == 1


def test_explain_a_shape_for_an_architecture(file):
    text = str(lorasb_kernels.explain((4096, 4096, 96), tokens=8192, arch="sm_86"))
    assert "backend triton: planned for sm_86" in text
    assert "shrink: projection kernel [64×64, 4 warps, 3 stages] (rank 96 as 3 tiles of 32" in text
    assert "expand: fused [64×64×32, 4 warps, 3 stages] (measured on 2026-01-02" in text
    assert "dx: two_call (not measured" in text
    split = lorasb_kernels.explain((4096, 4096, 96), tokens=64, arch="sm_86").steps[0]
    assert "split 8 ways" in split.reason


def test_explain_on_a_gpu_older_than_the_tables(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    explained = lorasb_kernels.explain((24, 16, 4), device="cuda:7")
    assert (explained.backend, explained.steps) == ("reference", ())


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
