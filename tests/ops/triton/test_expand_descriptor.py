"""`expand` with tensor maps: its values, and which operands a tensor map can describe."""

import math

import pytest
import torch

from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.triton import expand as expand_triton
from lorasb_kernels.ops.triton import expand_descriptor
from lorasb_kernels.ops.triton import expand_route as route
from lorasb_kernels.ops.triton.expand_descriptor import descriptor_expand
from lorasb_kernels.ops.triton.route_decision import Route, Shape, describable, shape_of
from lorasb_kernels.ops.triton.route_files import DeviceFile, Measured, RouteFile, Timed
from lorasb_kernels.ops.triton.tiles import ExpandTile
from tests.ops.conftest import ON_GPU
from tests.ops.operands import check, dropout_seed, normal, same_bits

TILE = ExpandTile(num_warps=4, num_stages=2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
# M, N, K, r: any M; sizes of one and of several tiles, with edges; ranks of partial tiles.
SHAPES = [
    (0, 16, 24, 8),
    (1, 8, 8, 8),
    (33, 72, 136, 24),
    (64, 64, 64, 32),
    (66, 72, 40, 72),
]
if ON_GPU:
    SHAPES += [(129, 4096, 1000, 96), (2049, 1112, 4096, 512)]


@pytest.fixture(autouse=True)
def triton_runs(device):
    reason = obstacle("triton", device, torch.float32)
    if reason is None and ON_GPU and torch.cuda.get_device_capability(device)[0] < 9:
        reason = "the device has no tensor memory accelerator"
    if reason is not None:
        pytest.skip(reason)


# Triton's interpreter multiplies bf16 wrongly; the PTX tests cover it.
@pytest.fixture(params=["float32", "float16"] + ["bfloat16"] * ON_GPU)
def dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture
def described(monkeypatch):
    """Makes `expand` take the route; returns the tiles that it was launched with.

    Without a GPU a block takes every other tile.
    """
    launched = []

    def counted(*arguments):
        launched.append(arguments[-1])
        return descriptor_expand(*arguments)

    def chosen(*arguments):
        return Route("fused_descriptor", TILE, "forced by a test")

    if not ON_GPU:
        monkeypatch.setattr(expand_descriptor, "resident_blocks", lambda *arguments: 2)
    monkeypatch.setattr(expand_triton, "choose_route", chosen)
    monkeypatch.setitem(expand_triton.RUN, "fused_descriptor", counted)
    return launched


def operands(M, N, K, r, dtype, device, transposed):
    weight = normal(N, K, dtype=dtype, device=device, seed=1) / math.sqrt(K)
    factor = normal(N, r, dtype=dtype, device=device, seed=3) / math.sqrt(r)
    if transposed:
        weight, factor = weight.T.contiguous().T, factor.T.contiguous().T
    x = normal(M, K, dtype=dtype, device=device)
    return x, weight, normal(M, r, dtype=dtype, device=device, seed=2), factor


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "r"), SHAPES)
def test_values(M, N, K, r, transposed, dropout, dtype, device, described):
    bias = None if transposed else normal(N, dtype=dtype, device=device, seed=4)
    seed = dropout_seed(device) if dropout else None
    arguments = (*operands(M, N, K, r, dtype, device, transposed), bias, dropout, seed)
    (y,) = check(expand, "triton", *arguments)
    assert described == [TILE, TILE]
    if not ON_GPU:
        fused = expand_triton.fused_expand(*arguments, TILE)
        assert same_bits(y, fused), "the interpreter adds in the order of the steps, as fused does"


def test_rows_apart_in_memory(dtype, device, described):
    """Every other row, and a range of columns that starts at a multiple of 16 bytes."""
    x, *rest = operands(50, 40, 88, 16, dtype, device, transposed=False)
    x, weight = x[::2, 8:], rest[0][:, 8:]
    p = rest[1][:25]
    assert describable(x, weight, p, rest[2])
    check(expand, "triton", x, weight, p, rest[2], None, 0.0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_shows(bad, device, described):
    arguments = operands(20, 40, 72, 24, torch.float16, device, transposed=False)
    clean = expand(*arguments, None, 0.0, None, "triton")
    for position, index, place in (
        (0, (3, 71), (3, slice(None))),
        (1, (4, 71), (slice(None), 4)),
        (2, (5, 23), (5, slice(None))),
        (3, (6, 23), (slice(None), 6)),
    ):
        spoiled = [tensor.clone() for tensor in arguments]
        spoiled[position][index] = bad
        y = expand(*spoiled, None, 0.0, None, "triton")
        assert not y[place].isfinite().any()
        y[place] = clean[place]
        assert torch.equal(y, clean)


def test_what_can_be_described(device):
    matrix = torch.zeros(8, 64, dtype=torch.float16, device=device)
    assert describable(matrix, matrix.T, matrix[::2], matrix[:, 8:], matrix[:3])
    assert not describable(matrix[:, ::2]), "no contiguous dimension"
    assert not describable(matrix, matrix[:, 4:]), "the base is at 8 bytes"
    assert not describable(matrix.view(-1)[:60].view(3, 20)), "rows of 40 bytes"
    assert not describable(matrix[:1].expand(4, 64)), "a row that is four"


OTHER_TILE = ExpandTile(num_warps=8, num_stages=3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes times for sm_90 in which tensor maps are fastest, for a class of shapes."""

    def write(shape: Shape):
        times = {
            "two_call": (3.0, TILE),
            "fused": (2.0, OTHER_TILE),
            "fused_descriptor": (1.0, TILE),
        }
        routes = {name: Timed(*timed) for name, timed in times.items()}
        found = {shape.key: Measured("2026-01-02", shape.rows, routes)}
        file = tmp_path / "tuning.json"
        file.write_text(RouteFile("sm_90", {}, found).text())
        monkeypatch.setenv("LORASB_TUNING", str(file))
        route.forget_routes()

    yield write
    route.forget_routes()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "fused_descriptor"),
        ({"K": 4100}, "fused"),
        ({"r": 90}, "fused"),
        ({"N": 4100}, "fused"),
    ],
)
def test_shapes_that_cannot_be_described_take_the_next_fastest(changes, taken, tuned):
    sizes = {"rows": 8192, "N": 4096, "K": 4096, "r": 96, "transposed": False, "dropout": False}
    shape = Shape(torch.bfloat16, **{**sizes, **changes})
    tuned(shape)
    chosen = route.plan_route("sm_90", shape)
    assert chosen.name == taken
    assert chosen.tile == (TILE if taken == "fused_descriptor" else OTHER_TILE)
    assert "two_call 3.0 µs, fused 2.0 µs, fused_descriptor 1.0 µs" in chosen.reason
    assert ("rows at multiples of 16 bytes" in chosen.reason) == (taken == "fused")


@pytest.mark.parametrize("transposed", [False, True])
def test_operands_that_cannot_be_described_take_the_next_fastest(
    transposed, tuned, monkeypatch, device, tmp_path
):
    x, weight, p, factor = operands(32, 40, 72, 16, torch.float16, device, transposed)
    tuned(shape_of(x, weight, p, 0.0))
    monkeypatch.setattr(route, "architecture", lambda device: "sm_90")
    kept = DeviceFile(tmp_path / "none.json", "sm_90", {})
    monkeypatch.setattr(route, "device_file", lambda device: kept)

    def chosen(x):
        return route.choose_route(x, weight, p, factor, None, 0.0, None, expand_triton.RUN).name

    assert chosen(x) == "fused_descriptor"
    shifted = torch.zeros(32, 80, dtype=x.dtype, device=device)[:, 4:76]
    columns_first = x.T.contiguous().T
    assert [chosen(other) for other in (shifted, columns_first)] == ["fused", "fused"]
