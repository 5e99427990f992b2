"""`lorasb explain` and `lorasb tune`: what they print and write, and input they cannot use."""

import contextlib
import json

import pytest
import torch

from lorasb_kernels.cli.main import main
from lorasb_kernels.ops import tune
from lorasb_kernels.ops.triton import expand_route as route

LAYER = ["--layer", "64", "96", "--r", "8", "--tokens", "16", "32"]
TILE = {"num_warps": 4, "num_stages": 3, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
TIMES = {"two_call": 3.0, "fused": 2.0, "fused_descriptor": 1.0}


@pytest.fixture(autouse=True)
def no_tuning_known(monkeypatch):
    monkeypatch.delenv("LORASB_TUNING", raising=False)
    route.forget_tuning()
    yield
    route.forget_tuning()


@pytest.fixture
def hopper(monkeypatch):
    """A device that takes the same time for every shape; the file and the routes are real."""
    if torch.cuda.is_available():
        pytest.skip("tests/ops/triton/test_expand_route.py measures on the device")

    def measure(layer, transposed, dtype, device):
        N, K = (layer.n, layer.m) if transposed else (layer.m, layer.n)
        entry = {name: {"microseconds": time, "tile": TILE} for name, time in TIMES.items()}
        return route.shape_key(dtype, layer.M, N, K, layer.r, transposed, False), entry

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "measure", measure)


def test_explain_plans_for_an_architecture(capsys):
    assert main(["explain", "4096", "4096", "--r", "96", "--arch", "sm_86"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backend triton: planned for sm_86\n")
    for line in (
        "shrink: projection kernel [64×64, 4 warps, 3 stages] (rank 96 as 3 tiles of 32",
        "expand: two_call (not measured on sm_86",
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


def test_tune_writes_what_explain_then_reads(hopper, tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuning.json"
    assert main(["tune", str(file), *LAYER]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5, "two products of one layer at two numbers of tokens, and the end"
    assert "M<=16 N=64 K=96 r<=16 weight=plain dropout=no: fused_descriptor" in printed[0]
    assert printed[-1] == f"wrote {file}; set LORASB_TUNING={file} to use it"
    content = json.loads(file.read_text())
    assert content["arch"] == "sm_90"
    assert content["measured_on"]["device"] == "a device"
    assert len(content["expand"]) == 4

    monkeypatch.setenv("LORASB_TUNING", str(file))
    explain = ["explain", "64", "96", "--r", "8", "--tokens", "30", "--arch"]
    assert main([*explain, "sm_90"]) == 0
    measured = "two_call 3.0 µs, fused 2.0 µs, fused_descriptor 1.0 µs"
    line = "expand: fused_descriptor [64×64×32, 4 warps, 3 stages] (measured (tuning.json): "
    assert line + measured in capsys.readouterr().out
    assert main([*explain, "sm_86"]) == 0
    assert "expand: two_call (not measured on sm_86" in capsys.readouterr().out


def test_tune_extends_a_file_of_its_architecture_alone(hopper, tmp_path, capsys):
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"format": 2, "arch": "sm_90", "expand": {}}))
    assert main(["tune", str(file), *LAYER]) == 0
    assert main(["tune", str(file), *LAYER[:-1], "64"]) == 0
    content = json.loads(file.read_text())
    assert len(content["expand"]) == 6

    capsys.readouterr()
    before = json.dumps({**content, "arch": "sm_86"})
    file.write_text(before)
    route.forget_tuning()
    assert main(["tune", str(file), *LAYER]) == 2
    assert f"path is {str(file)!r}, measured on sm_86; expected sm_90" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize("cut_short_after", [1, 2])
def test_what_was_measured_outlives_an_interruption(cut_short_after, hopper, tmp_path, monkeypatch):
    measure, calls = tune.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 2 * cut_short_after:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(tune, "measure", interrupted)
    file = tmp_path / "tuning.json"
    with pytest.raises(KeyboardInterrupt):
        main(["tune", str(file), *LAYER, "64"])
    assert len(json.loads(file.read_text())["expand"]) == 2 * cut_short_after


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
        ("{", "{file} is not a tuning file"),
        ('{"format": 1}', "format is 1; expected 2"),
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
def test_tune_needs_a_device(tmp_path, capsys):
    file = tmp_path / "tuning.json"
    assert main(["tune", str(file), *LAYER]) == 2
    assert "no CUDA device is available; expected one" in capsys.readouterr().err
    assert not file.exists()


def test_tune_checks_its_shapes_before_it_measures(hopper, tmp_path, capsys):
    file = tmp_path / "tuning.json"
    assert main(["tune", str(file), "--layer", "64", "0"]) == 2
    assert "in_features is 0; expected at least 1" in capsys.readouterr().err
    assert not file.exists()
