"""When the CUDA extension's kernel for Hopper is one of `expand`'s routes."""

import pytest
import torch

import lorasb_kernels
from lorasb_kernels.ops.triton import expand_dual, expand_route, route_decision
from lorasb_kernels.ops.triton.expand_dual import has_dual
from lorasb_kernels.ops.triton.route_decision import Shape
from lorasb_kernels.ops.triton.route_files import RouteFile
from lorasb_kernels.ops.triton.route_measuring import candidates
from lorasb_kernels.ops.triton.tiles import expand_tile
from tests.ops.triton.routes import MEASURED_ON, entry

BF16 = torch.bfloat16
SHAPE = Shape(BF16, 8192, 4096, 4096, 96, transposed=False, dropout=False)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`dual` was the fastest on sm_90."""
    path = tmp_path / "tuning.json"
    found = {SHAPE.key: entry(two_call=3.0, fused_descriptor=2.0, dual=1.0)}
    path.write_text(RouteFile("sm_90", MEASURED_ON, found).text())
    monkeypatch.setenv("LORASB_TUNING", str(path))
    expand_route.forget_routes()
    yield
    expand_route.forget_routes()


@pytest.mark.parametrize(
    ("loaded", "capability", "dtype", "there"),
    [
        (True, (9, 0), BF16, True),
        (True, (9, 0), torch.float16, True),
        (True, (9, 0), torch.float32, False),
        (True, (10, 0), BF16, False),
        (True, (8, 6), BF16, False),
        (False, (9, 0), BF16, False),
    ],
)
def test_it_is_there_on_hopper_in_16_bits_if_it_is_loaded(
    loaded, capability, dtype, there, monkeypatch
):
    monkeypatch.setattr(expand_dual, "dual_is_loaded", lambda: loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_dual(torch.device("cuda"), dtype) == there
    assert not has_dual(torch.device("cpu"), dtype)


def test_it_is_tried_once_and_only_where_it_is_there():
    without = candidates("sm_90", BF16, dropout=True, described=True)
    tried = candidates("sm_90", BF16, dropout=True, described=True, dual=True)
    assert [name for name, _ in without].count("dual") == 0
    assert set(tried) - set(without) == {("dual", expand_tile("sm_90", BF16, True))}


def test_it_is_taken_where_it_was_measured_to_be_the_fastest(measured, monkeypatch):
    monkeypatch.setattr(route_decision, "dual_is_loaded", lambda: True)
    assert expand_route.plan_route("sm_90", SHAPE).name == "dual"
    assert expand_route.plan_route("sm_90", SHAPE).otherwise.name == "two_call"


def test_explain_names_no_tile_of_triton_s_for_it(measured, monkeypatch):
    monkeypatch.setattr(route_decision, "dual_is_loaded", lambda: True)
    steps = lorasb_kernels.explain((4096, 4096, 96), tokens=8192, arch="sm_90").steps
    (step,) = [step for step in steps if step.operation == "expand"]
    assert (step.runs, step.tile) == ("dual", None)


def test_without_the_extension_the_next_fastest_is_taken(measured):
    chosen = expand_route.plan_route("sm_90", SHAPE)
    assert chosen.name == "fused_descriptor"
    assert "dual needs the CUDA extension" in chosen.reason


def test_the_rule_does_not_take_it(monkeypatch):
    monkeypatch.setattr(route_decision, "dual_is_loaded", lambda: True)
    for rows in (64, 512, 8192):
        for r in (8, 96, 512):
            route = expand_route.plan_route("sm_90", SHAPE._replace(rows=rows, r=r))
            assert route.name != "dual"
