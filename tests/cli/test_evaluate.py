"""`lorasb evaluate`: a trained run on test sets that training knew nothing of."""

import json

import pytest

from lorasb_kernels.cli.main import main
from tests.train.conftest import reviews, sums

TRAINING = ["--batch-size", "8", "--init-minimum", "8", "--max-length", "32", "--r", "4"]
TRAINING += ["--max-steps", "2", "--learning-rate", "2e-2"]


def write(path, rows) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def sets(tmp_path):
    asked = [e.instruction for e in sums(24)]
    rows = {
        "train": [{"query": e.instruction, "response": e.response} for e in sums(24)],
        "gsm8k": [{"question": q, "answer": f"#### {i % 3}"} for i, q in enumerate(asked)],
        "math": [{"problem": q, "solution": r"$\boxed{\frac12}$"} for q in asked[:5]],
    }
    return {name: write(tmp_path / f"{name}.json", own) for name, own in rows.items()}


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("method", ["lora-sb", "full", "dora", "pissa"])
def test_a_run_is_judged_as_it_was_after_training(llama, sets, tmp_path, method, capsys):
    folder = tmp_path / "run"
    arguments = ["--model", str(llama), "--data", sets["train"], "--method", method, *TRAINING]
    arguments += ["--eval-data", sets["train"], "--output-dir", str(folder)]
    assert main(["train", *arguments]) == 0
    capsys.readouterr()
    more = ["--data", sets["train"], sets["gsm8k"], sets["math"], "--max-new-tokens", "4"]
    assert main(["evaluate", "--run", str(folder), *more]) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    assert [(one["metric"], one["rows"]) for one in found] == [
        ("loss", 24),
        ("numeric", 24),
        ("math", 5),
    ]
    assert found[0]["value"] == pytest.approx(result(folder)["after"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "average" not in printed  # of a loss and shares
    assert main(["evaluate", "--run", str(folder), *more[:1], *more[2:]]) == 0
    average = sum(one["value"] for one in found[1:]) / 2
    assert f"{average:.4f}" in capsys.readouterr().out.split("average")[1]
    again = json.loads((folder / "evaluation.json").read_text())
    assert sorted(map(str, again)) == sorted(map(str, found))


def test_a_classifier_keeps_its_head(bert, tmp_path):
    rows = [{"sentence": row.text, "label": row.label} for row in reviews(16)]
    data, folder = write(tmp_path / "train.json", rows), tmp_path / "run"
    other = write(tmp_path / "other.json", [row for row in rows if row["label"] == 1])
    arguments = ["--model", str(bert), "--data", data, "--task", "classification", *TRAINING]
    arguments += ["--eval-data", data, "--output-dir", str(folder), "--evaluation", "matthews"]
    assert main(["train", *arguments]) == 0
    for metric, sets in ((None, [data]), ("accuracy", [data, other])):
        chosen = ["--evaluation", metric] if metric else []
        assert main(["evaluate", "--run", str(folder), "--data", *sets, *chosen]) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    assert found[0]["value"] == result(folder)["after"]
    assert [(one["metric"], one["rows"]) for one in found[1:]] == [
        ("accuracy", 16),
        ("accuracy", 8),
    ]


def test_what_cannot_be_evaluated_is_one_line(llama, sets, tmp_path, capsys):
    folder = tmp_path / "run"
    train = ["--model", str(llama), "--data", sets["train"], "--output-dir", str(folder), *TRAINING]
    evaluate = ["evaluate", "--run", str(folder), "--data"]

    def refused(arguments, message):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("lorasb: ")
        assert message in error

    refused([*evaluate, sets["train"]], "expected a run's output")
    assert main(["train", *train]) == 0
    capsys.readouterr()
    refused([*evaluate, "none.jsonl"], "none.jsonl")
    refused([*evaluate, sets["train"], "--evaluation", "accuracy"], "expected one of loss, numeric")
    refused([*evaluate, sets["train"], "--evaluation", "math"], "evaluation row 1: response")
    (folder / "result.json").unlink()
    refused([*evaluate, sets["train"]], "which has not finished")
