"""The command line: help without heavy imports, one-line errors, whole runs."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasb_kernels
from lorasb_kernels.cli.main import COMMANDS, main
from tests.train.conftest import sums

NOWHERE = ("--model", "/nowhere", "--adapter", "/nowhere")


def flags(model, data, output_dir, *more) -> list[str]:
    return [
        *("--model", str(model), "--data", str(data), "--output-dir", str(output_dir)),
        *("--batch-size", "8", "--init-minimum", "8", "--max-length", "32", "--r", "4"),
        *("--max-steps", "3", "--learning-rate", "2e-2", *more),
    ]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"usage: lorasb {command}".strip() in capsys.readouterr().out


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from lorasb_kernels.cli.main import build_parser; build_parser();"
        "print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_packages_that_are_imported_on_the_way_stay_silent(llama):
    command = [sys.executable, "-m", "lorasb_kernels.cli.main", "describe", str(llama), "--r", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_version(capsys):
    assert main(["version"]) == 0
    printed = capsys.readouterr().out
    assert f"lorasb_kernels {lorasb_kernels.__version__}" in printed
    info = lorasb_kernels.build_info()
    assert (info["reason"] if info["extension"] is None else info["architectures"]) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "missing model, data, output_dir"),
        (["train", "--config", "none.yaml"], "config is 'none.yaml': No such file"),
        (["train", "--model", "m", "--data", "d", "--output-dir", "o", "--r", "0"], "r is 0"),
        (["train", "--model", "m", "--data", "d.txt", "--output-dir", "o"], "data is 'd.txt'"),
        (["describe", "/nowhere"], "nowhere"),
        (["merge", *NOWHERE, "--out", "."], "--out is '.', which exists"),
        (["merge", *NOWHERE, "--out", "new"], "nowhere"),
    ],
)
def test_input_errors_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorasb: ")
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, "r is 33; expected r <= "),
        ({"target_modules": ["q_project"]}, "target_modules 'q_project' matched no linear layer"),
        ({"target_modules": "(q"}, "target_modules is '(q'; expected a regular expression"),
        ({"model": "/nowhere"}, "model is '/nowhere': "),
        ({"backend": "cuda"}, "backend is 'cuda', which cannot run: "),
        ({"output_dir": "sums.jsonl"}, "output_dir is 'sums.jsonl': "),
        ({"method": []}, "method is []; expected at least one of "),
        ({"method": ["lora", "lora"]}, "method is ['lora', 'lora']; expected each of them once"),
        ({"method": ["lora-sb", "lora-xs"], "output_dir": None}, "missing output_dir"),
        ({"learning_rate": 1e30, "method": "full"}, "is nan at step "),
    ],
    ids=str,
)
def test_errors_that_show_later_are_one_line_too(
    settings, message, llama, sums_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = {"model": str(llama), "data": "sums.jsonl", "output_dir": "run", "max_length": 32}
    given |= {"max_steps": 3, "init_minimum": 8} | settings
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({name: v for name, v in given.items() if v is not None}))
    diverges = "nan" in message
    assert main(["train", "--config", "run.yaml"]) == (1 if diverges else 2)
    error = capsys.readouterr().err
    assert f"lorasb: {message}" in error or (diverges and message in error)
    assert "Traceback" not in error
    left = {path.name for path in tmp_path.iterdir()} - {"sums.jsonl", "run.yaml"}
    assert left == ({"run"} if diverges else set())


@pytest.mark.parametrize("flag", [["--r", "x"], ["--method", "lorax"], ["--rank", "3"]])
def test_flags_are_checked(flag, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", *flag])
    assert end.value.code == 2


def test_train_from_a_file_then_merge(llama, sums_file, tmp_path, capsys):
    settings = {
        "model": str(llama),
        "data": str(sums_file),
        "eval_data": str(sums_file),
        "output_dir": str(tmp_path / "run"),
        "r": 2,
    }
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings))
    more = ["--r", "4", "--max-steps", "3", "--max-length", "32", "--init-minimum", "8"]
    assert main(["train", "--config", str(config), *more]) == 0
    output = capsys.readouterr().out
    assert "lora-sb" in output
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["r"] == 4

    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    assert main(["describe", str(llama), "--adapter", str(adapter)]) == 0
    assert "14 layers" in capsys.readouterr().out
    paths = ["--model", str(llama), "--adapter", str(adapter), "--out", str(merged)]
    assert main(["merge", *paths]) == 0
    adapted = lorasb_kernels.load_adapter(AutoModelForCausalLM.from_pretrained(llama), adapter)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not any("lora" in name for name in plain.state_dict())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        torch.testing.assert_close(plain.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_several_methods_share_a_plot(llama, sums_file, tmp_path, capsys):
    arguments = flags(llama, sums_file, tmp_path / "runs", "--method", "lora-sb", "lora-xs")
    assert main(["train", *arguments]) == 0
    output = capsys.readouterr().out
    assert "lora-sb" in output
    assert "lora-xs" in output
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["lora-sb", "lora-xs", "loss.png"]


def test_classification_from_csv(bert, tmp_path):
    data = tmp_path / "reviews.csv"
    data.write_text("text,label\n" + "good film,1\nbad film,0\n" * 8)
    arguments = flags(bert, data, tmp_path / "run", "--task", "classification")
    assert main(["train", *arguments, "--eval-data", str(data), "--evaluation", "matthews"]) == 0
    assert -1 <= json.loads((tmp_path / "run" / "result.json").read_text())["after"] <= 1


def test_describe_plans_without_weights(llama, capsys):
    assert main(["describe", str(llama), "--r", "8", "--target-modules", "q_proj", "v_proj"]) == 0
    output = capsys.readouterr().out
    assert "4 layers" in output
    assert f"{4 * 64:,}" in output


def test_toy_rows_stay_answerable():
    assert len({(e.instruction, e.response) for e in sums(48)}) > 20
