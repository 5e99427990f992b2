"""`lorasb explain` and `lorasb tune`: what they print and keep, and input they cannot use."""

import pytest
import torch

from lorasb_kernels.cli.main import main
from lorasb_kernels.ops import tune
from lorasb_kernels.ops.lorasb_linear import lorasb_group
from lorasb_kernels.ops.triton import expand as expand_triton
from lorasb_kernels.ops.triton import expand_route as route
from lorasb_kernels.ops.triton import route_files
from lorasb_kernels.ops.triton.route_decision import shape_of
from lorasb_kernels.profiling.shapes import TINY
from tests.ops.triton.routes import StubTimer, device_file

LAYER = ["--layer", "64", "96", "--r", "8", "--tokens", "16", "32", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path / "cache"))
    for name in ("LORASB_TUNING", "LORASB_TUNE"):
        monkeypatch.delenv(name, raising=False)
    route.forget_routes()
    yield
    route.forget_routes()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which the fused route always wins; file, operands and routes are real."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu/test_routes.py measures on the device")
    kept, timer, measured = device_file("sm_90"), StubTimer("fused"), tune.tune

    def on_the_cpu(layers, **options):
        return measured(layers, device="cpu", kept=kept, timer=timer, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(route_files, "device_file", lambda device: kept)
    monkeypatch.setattr(tune, "tune", on_the_cpu)
    return kept


def test_explain_plans_for_an_architecture(capsys):
    assert main(["explain", "4096", "4096", "--r", "96", "--arch", "sm_86"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backend triton: planned for sm_86\n")
    for line in (
        "shrink: projection kernel [64×64, 4 warps, 3 stages] (rank 96 as 3 tiles of 32",
        "expand: two_call (not measured on sm_86; by the rule",
        "core_backward: projection kernel",
        "dR: gradient kernel",
        "dx: two_call (not measured",
    ):
        assert line in printed


def test_explain_tells_a_masked_second_call_by_its_tile(capsys):
    assert main(["explain", "64", "96", "--arch", "sm_90", "--dropout", "0.1"]) == 0
    assert "dx: two_call [64×128×64, 8 warps, 3 stages]" in capsys.readouterr().out


def test_explain_on_this_device(capsys):
    assert main(["explain", "64", "96", "--backend", "reference"]) == 0
    assert capsys.readouterr().out == "backend reference: asked for by name\n"


def test_tune_keeps_what_explain_then_reads(hopper, monkeypatch, capsys):
    assert main(["tune", *LAYER]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5, "two products of one layer at two numbers of tokens, and the end"
    assert "M<=16 N=64 K=96 r<=16 weight=plain dropout=no: fused" in printed[0]
    assert printed[-1] == f"kept in {hopper.path}"
    assert len(hopper.read()) == 4

    monkeypatch.setenv("LORASB_TUNING", str(hopper.path))
    explain = ["explain", "64", "96", "--r", "8", "--tokens", "30", "--dtype", "float32", "--arch"]
    assert main([*explain, "sm_90"]) == 0
    shown = capsys.readouterr().out
    assert "expand: fused [128×64×32, 8 warps, 3 stages] (measured on " in shown
    assert f"at M = 32 ({hopper.path.name}): two_call 2.0 µs, fused 1.0 µs" in shown
    assert main([*explain, "sm_86"]) == 0
    assert "(not measured on sm_86; by the rule" in capsys.readouterr().out


def test_tune_takes_all_shapes_of_a_model(hopper, capsys):
    assert main(["tune", "--model", "tiny", *LAYER[3:5], "--tokens", "16", *LAYER[-2:]]) == 0
    shapes = {(layer.m, layer.n) for layer in TINY.layers}
    assert len(shapes) == 4
    assert len(hopper.read()) == 2 * len(shapes) + 1, "dx of q, k and v together: r = 24"
    for m, n in shapes:
        assert any(f" N={m} K={n} " in key and "plain" in key for key in hopper.read())
        assert any(f" N={n} K={m} " in key and "transposed" in key for key in hopper.read())


def test_tune_takes_what_siblings_on_one_input_ask_for(hopper, monkeypatch):
    rank, tokens = 24, 16  # sums of 72 and 48, each of another class
    sizes = ["--r", str(rank), "--tokens", str(tokens), "--dtype", "float32"]
    assert main(["tune", "--model", "tiny", *sizes]) == 0
    asked = []

    def choose(x, weight, p, factor, bias, dropout, *others):
        asked.append(shape_of(x, weight, p, dropout).key)
        return choose_route(x, weight, p, factor, bias, dropout, *others)

    choose_route = expand_triton.choose_route
    monkeypatch.setattr(expand_triton, "choose_route", choose)
    monkeypatch.setenv("LORASB_TUNE", "off")
    for group in TINY.groups:
        x = torch.randn(tokens, group[0].n, requires_grad=True)
        weights = [torch.randn(layer.m, layer.n) for layer in group]
        As = [torch.randn(rank, layer.n) for layer in group]
        Rs = [torch.randn(rank, rank, requires_grad=True) for _ in group]
        Bs = [torch.randn(layer.m, rank) for layer in group]
        ys = lorasb_group(x, weights, As, Rs, Bs, [None] * len(group), backend="triton")
        sum(y.sum() for y in ys).backward()
    assert any("r<=96 " in key for key in asked), "q, k and v"
    assert any("r<=64 " in key for key in asked), "gate and up"
    assert set(asked) <= hopper.read().keys()


def test_with_dropout_siblings_compute_for_themselves(hopper):
    assert main(["tune", "--model", "tiny", *LAYER[3:5], "--tokens", "16", "--dropout", "0.1"]) == 0
    assert len(hopper.read()) == 2 * len({(layer.m, layer.n) for layer in TINY.layers})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "64", "96", "--arch", "sm_70"], "arch is 'sm_70'; expected one of"),
        (["explain", "64", "96", "--backend", "cutlass"], "backend is 'cutlass'"),
        (["explain", "0", "96", "--arch", "sm_86"], "out_features is 0; expected at least 1"),
        (["explain", "64", "-3", "--arch", "sm_86"], "in_features is -3; expected at least 1"),
        (["explain", "64", "96", "--r", "0"], "r is 0; expected at least 1"),
        (["explain", "64", "96", "--arch", "sm_86", "--r", "600"], "r is 600; expected at most"),
        (["explain", "64", "96", "--tokens", "0"], "tokens is 0; expected at least 1"),
        (["explain", "64", "96", "--dropout", "1"], "dropout is 1.0; expected 0 <= dropout < 1"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lorasb: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "LORASB_TUNING is '{file}'; expected an existing file"),
        ("{", "{file} is not a file of measured routes"),
        ('{"format": 1}', "format is 1; expected 3"),
    ],
)
def test_an_unusable_tuning_file_is_named(content, message, tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuning.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("LORASB_TUNING", str(file))
    assert main(["explain", "64", "96", "--arch", "sm_86"]) == 2
    assert message.format(file=file) in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_needs_a_device(capsys):
    assert main(["tune", *LAYER]) == 2
    assert "no CUDA device is available; expected one" in capsys.readouterr().err


def test_tune_checks_its_shapes_before_it_measures(hopper, capsys):
    assert main(["tune", "--layer", "64", "96", "--layer", "64", "0"]) == 2
    assert "in_features is 0; expected at least 1" in capsys.readouterr().err
    assert main(["tune", "--model", "/no/such/model"]) == 2
    assert "/no/such/model" in capsys.readouterr().err
    assert not hopper.path.exists()
