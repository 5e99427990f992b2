"""Every command of docs/reproduce.md, on small files in the distributed form with a tiny model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lorasb_kernels.cli.main import main
from tests.train.conftest import reviews, sums

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
# Commands of one block may build on one another.
BLOCKS = [
    [
        " ".join(command.replace("\\\n", " ").split())
        for command in re.findall(r"lorasb (?:.*\\\n)*.*", block)
    ]
    for block in re.findall(r"(?:^ {4,}.*\n)+", PAGE, re.MULTILINE)
]
COMMONSENSE = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"]
COMMONSENSE += ["ARC-Challenge", "ARC-Easy", "openbookqa"]
GLUE = {"cola": ("sentence",), "stsb": ("sentence1", "sentence2")}
GLUE |= {"rte": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
BOUNDS = {"max_steps": 1, "max_length": 120, "max_new_tokens": 2}
BOUNDS |= {"batch_size": 8, "accumulation": 1, "eval_batch_size": 16}


def write_data(folder: Path) -> None:
    """Rows with the fields of the papers' data, of a few words each."""
    asked = [(e.instruction, e.response) for e in sums(16)]
    files = {
        "MetaMathQA-395K.json": [
            {"query": q, "response": f"{a}\n#### 7\nThe answer is: 7", "type": "GSM_SV"}
            for q, a in asked
        ],
        "gsm8k_test.jsonl": [{"question": q, "answer": f"{a}\n#### 7"} for q, a in asked[:3]],
        "MATH_test.jsonl": [{"problem": q, "solution": r"\boxed{\frac12}"} for q, _ in asked[:3]],
    }
    commonsense = [
        {
            "instruction": f"is {q}? Answer format: yes/no",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for (q, _), answer in zip(asked, ["yes", "no"] * 8, strict=True)
    ]
    files["commonsense_170k.json"] = commonsense
    files |= {f"{name}/test.json": commonsense[:3] for name in COMMONSENSE}
    for task, fields in GLUE.items():
        for part, count in (("train", 16), ("validation", 4)):
            files[f"glue/{task}_{part}.jsonl"] = [
                dict.fromkeys(fields, row.text)
                | {"label": row.label + (0.5 if task == "stsb" else 0), "idx": i}
                for i, row in enumerate(reviews(count))
            ]
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        path.write_text(text)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Data and contenders where the commands look for them, the latter one of each kind."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_data(folder / "data")
    for path in (ROOT / "examples" / "reproduce").iterdir():
        content = yaml.safe_load(path.read_text())
        kinds = {
            (entry["method"], *sorted(entry.keys() - {"label"})): entry
            for entry in content["contenders"]
        }
        few = [entry | {"r": 2 + entry["r"] % 3} for entry in kinds.values()]
        target = folder / "examples" / "reproduce" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump({**BOUNDS, "dtype": "float32", "contenders": few}))
    return folder


def small(command: str, models: dict[str, str]) -> list[str]:
    """The arguments of `lorasb` with a tiny model, one step and one seed."""
    arguments = [models.get(argument, argument) for argument in shlex.split(command)[1:]]
    for flag, value in (("--seeds", "1"), ("--r", "3")):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
    if arguments[0] in ("train", "init"):
        for key, value in BOUNDS.items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    return arguments


LLMS = ("mistralai/Mistral-7B-v0.1", "google/gemma-2-9b", "meta-llama/Llama-3.2-3B")
LLMS += ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("block", BLOCKS, ids=[block[0][7:60] for block in BLOCKS])
def test_every_command_runs_to_its_table(block, workplace, bert, llama, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    models = dict.fromkeys(LLMS, str(llama)) | {"FacebookAI/roberta-large": str(bert)}
    compared = set()
    for command in block:
        arguments, few = small(command, models), []
        if arguments[0] == "compare":
            path = Path(arguments[arguments.index("--config") + 1])
            few = yaml.safe_load(path.read_text())["contenders"]
            if path in compared:  # with another model or task: one contender will do
                few = few[:1]
                arguments += ["--only", few[0].get("label", f"{few[0]['method']}-r{few[0]['r']}")]
            compared.add(path)
        assert main(arguments) == 0, (command, capsys.readouterr().err)
        printed = capsys.readouterr().out
        if arguments[0] == "compare":
            folder = Path(arguments[arguments.index("--output-dir") + 1])
            table = json.loads((folder / "table.json").read_text())
            assert len(table) == len(few)
            start, end = arguments.index("--test"), arguments.index("--seeds")
            assert all(list(row["sets"]) == arguments[start + 1 : end] for row in table)
            assert all(-1 <= value <= 1 for row in table for value in row["test"])
            assert (folder / "loss.png").exists()
        else:
            assert "│" in printed or "trainable" in printed or "samples" in printed


def test_no_contender_and_no_preset_is_left_out():
    named = {path.name for path in (ROOT / "examples" / "reproduce").iterdir()}
    assert named == set(re.findall(r"examples/reproduce/([\w-]+\.yaml)", PAGE))
    assert len(BLOCKS) > 8
    assert sum(map(len, BLOCKS)) == len(re.findall(r"^ +lorasb ", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("MetaMathQA-395K.json", {"question": "q"}, "format metamath: query, response"),
        ("commonsense_170k.json", {"instruction": "q"}, "format commonsense: instruction, output"),
        ("glue/cola_train.jsonl", {"sentence1": "q"}, "format glue-sentence: sentence, label"),
    ],
)
def test_a_row_of_another_form_is_named_before_training(
    name, bad, message, workplace, tmp_path, capsys
):
    source = workplace / "data" / name
    text = source.read_text()
    rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.split("\n")))
    rows[2] = bad
    path = tmp_path / source.name
    lines = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(lines)
    task = "classification" if "glue" in name else "causal-lm"
    arguments = ["train", "--model", "none", "--data", str(path), "--task", task]
    assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{path}:3: " in error
    assert message in error
    assert not (tmp_path / "run").exists()
