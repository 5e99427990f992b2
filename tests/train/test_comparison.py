"""`lorasb compare`: cells, tables, the reused learning rate, a task of the user's own."""

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lorasb_kernels.cli.main import main
from lorasb_kernels.profiling.memory_peak import peak_memory
from lorasb_kernels.train import comparison
from lorasb_kernels.train.comparison import Comparison, Contender, Task
from lorasb_kernels.train.demo.compare import SUITES
from lorasb_kernels.train.errors import ConfigError
from tests.train.conftest import reviews


@pytest.fixture
def task(bert):
    settings = {
        "model": str(bert),
        "data": "reviews",
        "task": "classification",
        "batch_size": 8,
        "max_steps": 3,
        "max_length": 32,
        "init_minimum": 8,
        "warmup_ratio": 0.0,
    }
    return Task("tiny", settings, reviews(32), reviews(16), {"test": reviews(20)})


CONTENDERS = (
    Contender("lora-one", 4, (1e-3, 1e-2)),
    Contender("lora-one", 4, settings={"gamma": 8.0}, label="gamma-8", rate_of="lora-one-r4"),
)


def test_cells_rows_and_table(task, tmp_path, monkeypatch):
    run = Comparison(task, tmp_path, seeds=(0, 1))
    first = run.run(CONTENDERS)
    assert [row["name"] for row in first] == ["lora-one-r4", "gamma-8"]
    best, other = first
    assert other["learning_rate"] == best["learning_rate"]
    assert best["learning_rate"] in (1e-3, 1e-2)
    assert best["validation"].keys() == {"0.001", "0.01"}
    assert all(len(row["test"]) == 2 for row in first)
    assert best["steps_per_second"] > 0
    assert best["init_seconds"] > 0
    # Two sweep runs evaluated on validation rows; two seeds per contender on test rows.
    assert len(list((tmp_path / "cells").iterdir())) == 2 + 4
    (path,) = (tmp_path / "cells").glob("gamma-8-lr*-seed1-test.json")
    cell = json.loads(path.read_text())
    assert cell["config"]["gamma"] == 8.0
    assert cell["rows"] == 20
    table = (tmp_path / "table.md").read_text()
    assert "| lora-one-r4 " in table
    assert "accuracy ± std" in table

    monkeypatch.setattr(comparison, "finetune", None)  # nothing is run again
    assert run.run(CONTENDERS) == first
    assert [row["name"] for row in run.run(CONTENDERS, ["gamma-8"])] == ["gamma-8"]
    with pytest.raises(ConfigError, match="no contender 'gamma-9'; expected some of lora-one-r4"):
        run.run(CONTENDERS, ["gamma-9"])


def test_contenders_see_the_same_samples_in_the_same_order(task, tmp_path):
    """And start from the same head: full fine-tuning and a frozen zero adapter agree at step 1."""
    contenders = (Contender("full", 4, (1e-4,)), Contender("lora", 4, (1e-4,)))
    Comparison(task, tmp_path, seeds=(0,)).run(contenders)
    losses = [
        json.loads(path.read_text())["losses"][0][1]
        for path in (tmp_path / "cells").glob("*-test.json")
    ]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_lower_loss_is_better(task, tmp_path, monkeypatch):
    values = iter((0.7, 0.3, 0.5))
    run = Comparison(Task("t", {}, [], [], {}, "loss"), tmp_path, (0,))
    monkeypatch.setattr(run, "cell", lambda *_: {"after": next(values)})
    tried = run.validated(Contender("lora", 4, (1.0, 2.0, 3.0)))
    assert max(tried, key=tried.get) == 2.0


def test_a_task_of_ones_own(bert, tmp_path, capsys):
    for name, count in (("train", 16), ("validation", 8), ("test", 8)):
        rows = [json.dumps({"text": row.text, "label": row.label}) for row in reviews(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {"model": str(bert), "data": str(tmp_path / "train.jsonl"), "max_steps": 2}
    settings |= {"task": "classification", "batch_size": 8, "max_length": 32, "init_minimum": 8}
    (tmp_path / "task.yaml").write_text(yaml.dump(settings))
    arguments = ["compare", "--config", str(tmp_path / "task.yaml"), "--seeds", "1"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--methods", "lora-one:4:1e-3"]
    assert main(arguments) == 2
    assert "--test is missing" in capsys.readouterr().err
    arguments += ["--test", str(tmp_path / "test.jsonl")]
    assert main([*arguments, "--methods", "lora-one:4:1e-3,1e-2"]) == 2
    assert "--validation is missing" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "lora-one-r4" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert row["name"] == "lora-one-r4"
    assert row["validation"] == {}  # a single learning rate is not judged
    # The optimizer is that of the method, not of the file's default method.
    (cell,) = (tmp_path / "out" / "cells").glob("*-test.json")
    assert json.loads(cell.read_text())["config"]["optimizer"] == "preconditioned"
    assert main([*arguments, "--methods", "lora-one:4"]) == 2
    assert "expected METHOD:R:RATE" in capsys.readouterr().err


def test_contenders_with_settings_of_their_own_on_several_sets(bert, tmp_path, capsys):
    for name, count in (("train", 16), ("a", 8), ("b", 4)):
        rows = [json.dumps({"sentence": row.text, "label": row.label}) for row in reviews(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {"model": str(bert), "data": str(tmp_path / "train.jsonl"), "max_steps": 2}
    settings |= {"task": "classification", "batch_size": 8, "max_length": 32, "init_minimum": 8}
    settings["contenders"] = [
        {"method": "lora-xs", "r": 4, "learning_rate": 1e-3, "lora_alpha": 16, "label": "xs-16"},
        {"method": "lora-sb", "r": 2, "learning_rate": [1e-3], "optimal_gradient": False},
    ]
    config = tmp_path / "task.yaml"
    config.write_text(yaml.dump(settings))
    tests = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    arguments = ["compare", "--config", str(config), "--seeds", "3", "--test", *tests]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["name"] for row in rows] == ["xs-16", "lora-sb-r2"]
    for row in rows:
        by_set = [row["sets"][name] for name in tests]
        for score, values in zip(row["test"], zip(*by_set, strict=True), strict=True):
            assert score == pytest.approx(sum(values) / 2)
    cell = next((tmp_path / "out" / "cells").glob("xs-16*seed0-test.json"))
    assert json.loads(cell.read_text())["config"]["lora_alpha"] == 16
    header, _, line, _ = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    names, values = ([cell.strip() for cell in text.split("|")] for text in (header, line))
    shown = dict(zip(names, values, strict=True))
    scores = sorted(rows[0]["test"])
    assert (shown["median"], shown["best"]) == (f"{scores[1]:.4f}", f"{scores[2]:.4f}")
    assert shown[tests[0]] == f"{sum(rows[0]['sets'][tests[0]]) / 3:.4f}"

    unusable = {"x": "expected mappings", "{rr: 1}": "unknown rr", "{r: 1}": "'method'"}
    for text, message in unusable.items():
        entry = yaml.safe_load(text)
        config.write_text(yaml.dump(settings | {"contenders": [entry]}))
        assert main([*arguments, "--output-dir", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err


def shown_at(width, rows, tests):
    """The lines of the terminal's table of `rows`."""
    task = Task("headlines", {}, [], [], {name: range(1000) for name in tests})
    console = Console(width=width, file=io.StringIO())
    console.print(Comparison(task, Path("out/compare"), range(3)).summary(rows))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("tests", [("test",), ("BoolQ", "PIQA", "a long name of a test set")])
@pytest.mark.parametrize("suite", SUITES)
def test_the_table_is_whole_at_80_columns(suite, tests):
    names = [contender.name for contender in SUITES[suite]]
    row = {"trainable": 22_713_986, "learning_rate": 0.00016, "loss": 0.4321, "seconds": 100.0}
    row |= {"init_seconds": 12.3, "steps_per_second": 12.34, "peak_bytes": 12_345e6}
    row |= {"test": [0.8, 0.81, 0.85], "sets": {name: [0.8, 0.81, 0.85] for name in tests}}
    lines = shown_at(80, [{"name": name, **row} for name in names], tests)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for name in names:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        cells = line.replace(" ± ", "±").split()
        assert cells == [name, "0.8200±0.0265", "22,713,986", "0.00016", "0.4321", "12345"]
    caption = " ".join(text.split())
    assert "also has: median, best," in caption
    assert len(tests) == 1 or ", ".join(tests) in caption


def test_a_long_name_goes_on_in_the_next_line():
    name = "an-orthogonal-start-with-sixty-four-samples-r16"
    row = {"trainable": 1, "learning_rate": 1.0, "loss": 1.0, "peak_bytes": None, "test": [0.5]}
    row |= {"init_seconds": 1.0, "steps_per_second": 1.0, "sets": {"test": [0.5]}}
    lines = shown_at(80, [{"name": name, **row}], ("test",))
    assert max(map(len, lines)) <= 80
    parts = [line[: line.find("  ")].strip() if "  " in line else line.strip() for line in lines]
    assert name in "".join(parts)


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_are_consistent(suite):
    names = [contender.name for contender in SUITES[suite]]
    assert len(names) == len(set(names))
    for contender in SUITES[suite]:
        assert bool(contender.learning_rates) != bool(contender.rate_of)
        assert not contender.rate_of or contender.rate_of in names


def test_peak_memory_sees_what_was_held_and_let_go():
    with peak_memory() as peak:
        held = bytearray(64 << 20)
        held[::4096] = b"x" * len(held[::4096])
        del held
    assert peak.bytes is None or (60 << 20) <= peak.bytes < (128 << 20)
