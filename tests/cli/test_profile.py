"""`lorasb profile`: a prediction says that it is one, a measurement leaves a trace."""

import json
import re
from pathlib import Path

import pytest
import torch

from lorasb_kernels.cli.main import main
from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.profiling.prediction import model_kinds, predict, preset_of


def test_a_prediction_is_marked(capsys):
    assert main(["profile", "--model", "mistral-7b", "--gpu", "a6000", "--results", "none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION, not measured: NVIDIA RTX A6000")
    assert "Error of the prediction: unknown, no GPU has measurements yet." in out
    assert "down_proj" in out
    assert re.search(r"\| all +\| +\| +224 \|", out)


def test_the_model_gives_limits_multiples_and_rates(capsys):
    command = ["profile", "--model", "mistral-7b", "--rank", "16", "--tokens", "512"]
    assert main([*command, "--gpu", "4090", "--results", "none"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTION by the performance model: NVIDIA GeForce RTX 4090" in out
    assert "bench: L40" in out
    assert "| q_proj 4096×4096, M 512, r 16" in out
    assert out.count("y: frozen GEMM alone") == 4
    assert "| rule +g " in out
    assert "mistral-7b, checkpointed" in out
    fused = out.count("y: fused 64×")
    assert main([*command, "--gpu", "4090", "--results", "none", "--tiles"]) == 0
    assert capsys.readouterr().out.count("y: fused 64×") > fused


def test_the_model_says_what_it_does_not_cover(capsys):
    command = ["profile", "--model", "tiny", "--rank", "4", "--gpu", "a6000", "--results", "none"]
    assert main([*command, "--dtype", "float32"]) == 0
    assert "The performance model covers 16 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "abacus"], "gpu is 'abacus'; expected one of a6000"),
        (["--gpu", "a6000", "--rank", "600"], "rank is 600; expected 1 <= rank <= 512"),
        (["--device", "cpu", "--rank", "600"], "rank is 600; expected 1 <= rank <= 512"),
        (["--gpu", "a6000", "--tokens", "0"], "tokens is 0; expected at least 1"),
        (["--gpu", "a6000", "--device", "cpu"], "expected one: predict or measure"),
    ],
)
def test_bad_input_is_named(flags, message, capsys):
    assert main(["profile", "--model", "mistral-7b", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert main(["profile", "--model", "tiny"]) == 2
    assert "--gpu a6000 to predict" in capsys.readouterr().err


def test_a_measurement_leaves_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    sizes = ["--rank", "4", "--tokens", "8", "--dtype", "float32", "--backend", "reference"]
    command = ["profile", "--model", "tiny", "--device", "cpu", *sizes, "--trace", str(trace)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("Measured on CPU")
    assert "PREDICTION" not in out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "q_proj 48x48" in names


def test_a_model_in_a_folder(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    kinds = {
        kind.layer.name: (kind.layer.n, kind.layer.m, kind.count)
        for kind in model_kinds(str(tmp_path))
    }
    assert kinds["down_proj"] == (48, 32, 3)
    assert len(kinds) == 7
    preset = preset_of(str(tmp_path))
    assert [[layer.name for layer in group] for group in preset.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert (preset.blocks, preset.vocabulary) == (3, config.vocab_size)


@pytest.mark.parametrize("preset", ["mistral-7b", "llama-3.2-3b"])
def test_the_guide_shows_what_is_predicted(preset):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "a6000.md").read_text()
    assert predict(model_kinds(preset), 8192, 96, torch.bfloat16, GPUS["a6000"]) in guide
