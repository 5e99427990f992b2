"""A run and its output folder: who may write into it, and what is left there at each moment."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasb_kernels import load_adapter
from lorasb_kernels.io.subspace import UntrainedAdapterWarning, read_adapter
from lorasb_kernels.io.tensors import digest_of, read_tensors
from lorasb_kernels.train import run
from lorasb_kernels.train.errors import CheckpointError, ConfigError, DataError
from lorasb_kernels.train.output_folder import LOCK, claim, locked
from lorasb_kernels.train.run import find_start, finetune
from lorasb_kernels.train.samples import Example
from tests.train.conftest import sums, tiny_config
from tests.trust.killed_runs import AtStep, die, forked, on_changes, out_of_memory
from tests.trust.watching import tree


def contents(folder: Path) -> dict:
    """The files of a finished run by their meaning: tensors, and no seconds of the last start."""
    files = tree(folder)
    for name in files:
        if name.endswith(".safetensors"):
            tensors, metadata = read_tensors(folder / name)
            files[name] = (digest_of(tensors), metadata)
        elif name.endswith("manifest.json"):
            files[name] = sorted(json.loads(files[name])["files"])
    result = json.loads(files.pop("result.json"))
    del result["seconds"]
    return files | {"result.json": result}


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": None, "epochs": 1.5}])
def test_a_finished_run_that_ends_within_an_epoch_stays_as_it_is(llama, tmp_path, length):
    config = tiny_config(llama, tmp_path, save_steps=3, **length)
    first = finetune(config, sums(24))[2]
    assert first.steps == len(first.losses) == (4 if length["max_steps"] else 5)
    files = contents(tmp_path)
    for _ in range(2):
        again = finetune(config, sums(24))[2]
        assert (again.steps, again.losses) == (first.steps, first.losses)
        assert contents(tmp_path) == files


def test_an_adapter_that_is_not_trained_yet_says_so(llama, tmp_path):
    def stop():
        raise KeyboardInterrupt

    config = tiny_config(llama, tmp_path, max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, sums(24), callbacks=[AtStep(1, lambda _: stop())])

    def loaded():
        return load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")

    with pytest.warns(UntrainedAdapterWarning, match="adapter as it was before training"):
        loaded()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedAdapterWarning)
        model = finetune(config, sums(24))[0]  # starting from it is no reason to warn
        same = loaded()
    for own, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(own, other)


LONG = [Example("three plus four " * 20, "seven")]
NO_NUMBER = [Example("three plus four is", "seven")]
NO_CHOICE = [Example("three plus four is", "seven")]
ALIKE = [Example("is it good", "rose", ("rose", "tulip"))]  # both are the unknown token


@pytest.mark.parametrize(
    ("evaluation", "rows", "message"),
    [
        ("loss", LONG, "no evaluation row fits into max_length = 32 tokens"),
        ("numeric", NO_NUMBER, "response 'seven' holds no number"),
        ("choice", NO_CHOICE, r"choices are \(\); the metric 'choice' needs two"),
        ("choice", ALIKE, r"choices \('rose', 'tulip'\) are the same tokens"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_before_training(
    llama, tmp_path, evaluation, rows, message
):
    config = tiny_config(llama, tmp_path / "run", evaluation=evaluation)
    with pytest.raises(DataError, match=message):
        finetune(config, sums(24), rows)
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_final_evaluation_loses_nothing(llama, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    config = tiny_config(llama, tmp_path / "run", max_steps=3)
    whole = finetune(tiny_config(llama, tmp_path / "whole", max_steps=3), sums(24), sums(4))[2]
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            finetune(config, sums(24), sums(4))
    for name in ("adapter.safetensors", "subspace.safetensors"):
        own, other = (read_tensors(tmp_path / f / "adapter" / name) for f in ("run", "whole"))
        assert digest_of(own[0]) == digest_of(other[0])
    smaller = tiny_config(llama, tmp_path / "run", max_steps=3, eval_batch_size=2)
    result = finetune(smaller, sums(24), sums(4))[2]
    assert result.losses == whole.losses
    assert result.after == pytest.approx(whole.after, rel=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eval_batch_size"] == 2


def test_the_evaluation_of_a_run_may_change_but_not_what_is_trained(bert, tmp_path):
    from tests.train.conftest import reviews

    settings = {"task": "classification", "max_steps": 2}
    first = finetune(tiny_config(bert, tmp_path, **settings), reviews(16), reviews(6))[2]
    other = tiny_config(bert, tmp_path, **settings, evaluation="matthews", keep_checkpoints=1)
    assert finetune(other, reviews(16), reviews(6))[2].losses == first.losses
    regression = tiny_config(bert, tmp_path, **settings, evaluation="pearson")
    with pytest.raises(ConfigError, match="evaluation is 'pearson', but output_dir"):
        finetune(regression, reviews(16), reviews(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "model is '/nowhere'"),
        ({"r": 33}, "r is 33; expected r <= "),
        ({"target_modules": ("q_project",)}, "'q_project',? matched no linear layer"),
        ({"target_modules": "("}, r"target_modules is '\('; expected a regular expression"),
        ({"backend": "cuda"}, "backend is 'cuda', which cannot run: "),
        ({"method": "pissa", "target_modules": ("q_project",)}, "q_project"),
        ({"method": "pissa", "r": 33}, "r is 33; expected r <= 32 for "),
        ({"report_to": ("nobody",)}, "nobody"),
    ],
)
def test_a_failed_start_leaves_no_trace(llama, tmp_path, changes, message):
    folder = tmp_path / "runs" / "first"
    settings = {"model": llama, "max_steps": 1}
    wrong = settings | changes
    with pytest.raises(ConfigError, match=message):
        finetune(tiny_config(wrong.pop("model"), folder, **wrong), sums(8))
    assert not list(tmp_path.iterdir())
    finetune(tiny_config(settings.pop("model"), folder, **settings), sums(8))


def without_memory(step: int, config, rows) -> None:
    """A run that ends with an out-of-memory error in a step."""
    with pytest.raises(torch.OutOfMemoryError):
        finetune(config, rows, callbacks=[AtStep(step, out_of_memory)])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora-sb", {"batch_size": 4}),
        ("lora-sb", {"method": "dora"}),
        ("lora-sb", {"method": "full"}),
        ("lora", {"r": 2}),
        ("pissa", {"batch_size": 4}),
        ("pissa", {"method": "lora-xs"}),
        ("full", {"batch_size": 4, "method": "lora-sb"}),
    ],
)
def test_a_run_without_a_checkpoint_is_replaced(llama, tmp_path, capsys, method, changes):
    settings = {"max_steps": 2, "method": method}
    folder = tmp_path / "run"
    without_memory(0, tiny_config(llama, folder, **settings), sums(24))
    capsys.readouterr()
    settings |= changes
    result = finetune(tiny_config(llama, folder, **settings), sums(24))[2]
    name = "method" if "method" in changes else next(iter(changes))
    pattern = rf"start: .*method {settings['method']}; {name} is .*, which had no checkpoint\n"
    assert re.search(pattern, capsys.readouterr().out)
    whole = finetune(tiny_config(llama, tmp_path / "whole", **settings), sums(24))[2]
    assert result.losses == whole.losses
    own, other = contents(folder), contents(tmp_path / "whole")
    assert own.pop("config.json") != other.pop("config.json")  # they name their folders
    assert own.pop("result.json")["losses"] == other.pop("result.json")["losses"]
    assert own == other


def test_other_rows_replace_a_run_without_a_checkpoint(llama, tmp_path):
    config = tiny_config(llama, tmp_path / "run", max_steps=2, init_minimum=16)
    without_memory(0, config, sums(24))
    result = finetune(config, sums(16))[2]
    whole = tiny_config(llama, tmp_path / "whole", max_steps=2, init_minimum=16)
    assert result.losses == finetune(whole, sums(16))[2].losses


def test_the_same_settings_start_from_the_adapter_that_is_there(llama, tmp_path, capsys):
    config = tiny_config(llama, tmp_path, max_steps=2)
    without_memory(0, config, sums(24))
    finetune(config, sums(24))
    assert f"start: the adapter found in {tmp_path / 'adapter'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_with_results_is_not_replaced(llama, tmp_path, evaluated):
    """A checkpoint, or the metric of an epoch."""
    every = {"evaluate_every": "epoch"} if evaluated else {"save_steps": 2}
    config = tiny_config(llama, tmp_path, max_steps=8, **every)
    with pytest.raises(torch.OutOfMemoryError):
        finetune(config, sums(24), sums(4), callbacks=[AtStep(3, out_of_memory)])
    assert (tmp_path / "checkpoint-2").exists() != evaluated
    before = tree(tmp_path)
    smaller = tiny_config(llama, tmp_path, max_steps=8, batch_size=4, **every)
    with pytest.raises(ConfigError, match=r"batch_size is 4, but output_dir .* holds a run with 8"):
        finetune(smaller, sums(24), sums(4))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["lora-sb", "dora", "full"])
def test_what_was_trained_is_a_result(llama, tmp_path, method):
    """Also when somebody has removed the checkpoints and result.json."""
    finetune(tiny_config(llama, tmp_path, method=method, max_steps=1), sums(8))
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-1")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"batch_size is 4, but output_dir .* holds a run with 8"):
        finetune(tiny_config(llama, tmp_path, method=method, max_steps=1, batch_size=4), sums(8))
    with pytest.raises(CheckpointError, match="holds what was trained and none of the checkpoints"):
        finetune(tiny_config(llama, tmp_path, method=method, max_steps=1), sums(8))
    assert tree(tmp_path) == before


def test_a_kill_while_a_run_is_replaced(llama, tmp_path):
    """Neither of the two is started from the other's adapter, or from half of one."""
    first = tiny_config(llama, tmp_path / "run", max_steps=1)
    second = tiny_config(llama, tmp_path / "run", max_steps=1, batch_size=4)
    without_memory(0, first, sums(24))
    for count in range(1, 20):
        folder = tmp_path / f"run {count}"
        shutil.copytree(tmp_path / "run", folder)

        def replaces(folder=folder, count=count):
            on_changes(lambda n: die() if n == count else None)
            claim(folder, second, sums(16), replaces=True)

        status, _ = forked(replaces)
        starts = {
            size: find_start(folder, config, rows, processes=1)
            for size, config, rows in ((8, first, sums(24)), (4, second, sums(16)))
        }
        assert starts[4].adapter is None
        assert starts[8].replaces or starts[8].adapter is None or read_adapter(starts[8].adapter)
        if status == 0:
            assert starts[8].replaces
            assert not starts[4].replaces
            break
    assert count > 5


def test_a_damaged_model_is_named(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model is '.*model': "):
        finetune(tiny_config(model, tmp_path / "run"), sums(8))
    assert not (tmp_path / "run").exists()


def test_another_adapter_in_the_folder_is_refused(llama, tmp_path):
    finetune(tiny_config(llama, tmp_path / "a", max_steps=1), sums(8))
    for changes, message in (
        ({"r": 2}, "made with r = 4 where these settings say 2; expected the same"),
        ({"method": "lora-xs"}, "made with init = 'lora-sb' where these settings say 'lora-xs'"),
        ({"target_modules": ("q_proj",)}, "made with target_modules = 'all-linear'"),
        ({"dropout": 0.5}, "made with dropout = 0.0"),
        ({"method": "dora"}, "holds adapter and no config.json"),
    ):
        folder = tmp_path / "b"
        shutil.copytree(tmp_path / "a" / "adapter", folder / "adapter")
        before = tree(folder)
        with pytest.raises(ConfigError, match=message):
            finetune(tiny_config(llama, folder, max_steps=1, **changes), sums(8))
        assert tree(folder) == before
        shutil.rmtree(folder)


def test_a_run_says_where_it_starts_from(llama, tmp_path, capsys):
    def start(folder, **changes) -> str:
        finetune(tiny_config(llama, tmp_path / folder, max_steps=1, **changes), sums(8))
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("start: ")]
        return line

    assert start("a") == "start: a new adapter, method lora-sb"
    assert start("a") == f"start: checkpoint-1 of {tmp_path / 'a'}"
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "adapter").rename(tmp_path / "b" / "adapter")
    assert start("b") == f"start: the adapter found in {tmp_path / 'b' / 'adapter'}"
    assert start("c", method="full") == f"start: {llama}, method full"


@pytest.mark.parametrize("name", ["checkpoint-1", "result.json"])
def test_what_is_nobody_s_is_left_alone(llama, tmp_path, name):
    finetune(tiny_config(llama, tmp_path, max_steps=1), sums(8))
    for other in {"config.json", "result.json", "checkpoint-1"} - {name}:
        path = tmp_path / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=rf"holds {name} and no config\.json"):
        finetune(tiny_config(llama, tmp_path, max_steps=1), sums(8))
    assert tree(tmp_path) == before


HOLDER = """
import sys
from lorasb_kernels.train.output_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_the_name_of_its_user(holder, tmp_path):
    message = rf"run' is in use by process {holder.pid} on .*, started \d.*; expected its end"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).exists()


def test_the_lock_dies_with_its_holder(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / LOCK).read_text()
    assert (tmp_path / "run").exists()  # the holder had made it
    assert not (tmp_path / "run" / LOCK).exists()


def test_an_output_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(ConfigError, match=r"file.*; expected a folder to write into"),
            locked(folder),
        ):
            pass
    assert (tmp_path / "file").read_text() == ""
