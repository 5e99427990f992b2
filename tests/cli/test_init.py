"""`lorasb init`: an adapter on disk, or a prediction that reads no weights."""

import json

import pytest
from safetensors.torch import load_file

from lorasb_kernels.cli.main import main
from tests.train.conftest import reviews


def arguments(model, data, output_dir, *more):
    values = {"--model": model, "--data": data, "--output-dir": output_dir, "--r": 4}
    values |= {"--init-minimum": 8, "--batch-size": 4, "--max-length": 32, "--learning-rate": 1e-2}
    return ["init", *(str(part) for pair in values.items() for part in pair), *more]


def test_init_saves_the_adapter_that_training_starts_from(llama, sums_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(llama, sums_file, run)) == 0
    printed = capsys.readouterr().out
    assert "14 layers; captured energy" in printed
    report = json.loads((run / "init.json").read_text())
    assert len(report) == 14
    assert all(name in printed for name in report)
    assert (run / "init.png").read_bytes().startswith(b"\x89PNG")
    cores = load_file(run / "adapter" / "adapter.safetensors")["cores"]
    assert len(cores) == 14
    assert all(core.any() for core in cores)

    assert main(["train", *arguments(llama, sums_file, run, "--max-steps", "1")[1:]]) == 2
    assert "max_steps is 1, but output_dir" in capsys.readouterr().err


def test_init_does_not_overwrite_an_adapter(llama, sums_file, tmp_path, capsys):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert main(arguments(llama, sums_file, tmp_path / "run")) == 2
    assert "holds an adapter; expected another one" in capsys.readouterr().err


def test_init_refuses_methods_without_an_estimate(llama, sums_file, tmp_path, capsys):
    assert main(arguments(llama, sums_file, tmp_path, "--method", "lora")) == 2
    assert "method is 'lora'; expected one that takes samples: lora-sb" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_dry_run_reads_no_weights_and_writes_nothing(
    task, llama, bert, sums_file, tmp_path, capsys
):
    folder, data = (llama, sums_file) if task == "causal-lm" else (bert, tmp_path / "reviews.jsonl")
    if task == "classification":
        rows = [{"text": row.text, "label": row.label} for row in reviews(20)]
        data.write_text("\n".join(map(json.dumps, rows)))
    weights = tmp_path / "model"
    weights.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (weights / file.name).write_bytes(file.read_bytes())
    run = tmp_path / "run"
    assert main(arguments(weights, data, run, "--task", task, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert f"{14 if task == 'causal-lm' else 13} target layers" in printed
    assert "layerwise" in printed
    assert "8 samples" in printed
    assert not run.exists()
    assert main(arguments(weights, data, run, "--task", task, "--dry-run", "--gpu", "4090")) == 0
    again = capsys.readouterr().out
    assert "8 samples" in again
    assert again.rstrip().endswith("NVIDIA GeForce RTX 4090 with 24 GB")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "a6000"], "--gpu is 'a6000' without --dry-run; expected both"),
        (["--gpu", "abacus", "--dry-run"], "gpu is 'abacus'; expected one of a6000"),
    ],
)
def test_a_gpu_is_only_predicted_for(flags, message, llama, sums_file, tmp_path, capsys):
    assert main(arguments(llama, sums_file, tmp_path / "run", *flags)) == 2
    assert message in capsys.readouterr().err
