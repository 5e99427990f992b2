"""However a run ends, the next start gives the curve of the uninterrupted run or a clear error.

Never a silent restart, never half a checkpoint under a checkpoint's name, and no complete
checkpoint is lost except by the rule that keeps a fixed number. A run that has ended stays as it
is, and two in one folder do not harm each other. `killed_runs` makes the faults.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorasb_kernels.train.checkpoint import MANIFEST, check, seal
from lorasb_kernels.train.errors import CheckpointError, ConfigError
from lorasb_kernels.train.output_folder import claim, difference, remove_remains
from lorasb_kernels.utils.files import atomic_folder, replacing
from tests.train.conftest import sums, tiny_config
from tests.trust.killed_runs import KINDS

ROOT = Path(__file__).resolve().parents[2]
FILES = ("trained", "optimizer", "scheduler", "rng-0")


def outcomes(llama, bert, folder, faults) -> tuple[dict[str, dict], list[dict]]:
    """The unbroken runs by kind, and the outcome of each fault."""
    arguments = [llama, bert, folder, json.dumps(faults)]
    completed = subprocess.run(
        [sys.executable, "-m", "tests.trust.killed_runs", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    wholes = {line["kind"]: line for line in lines if "kind" in line}
    done = [line for line in lines if "fault" in line]
    assert len(done) == len(faults)
    return wholes, done


def same(whole: dict, other: dict) -> None:
    """The curve, evaluation and bits of the unbroken run, and nothing else in the folder."""
    assert other["status"] == 0, other["error"]
    for name in ("losses", "after", "bits", "checkpoints"):
        assert other[name] == whole[name], name
    assert whole["bits"]
    assert not other["remains"]


def check_kills(llama, bert, folder, faults):
    wholes, kills = outcomes(llama, bert, folder, faults)
    for whole in wholes.values():
        assert whole["epochs"] % 1, "it ends within an epoch"
    for kill in kills:
        kind, fault, _ = kill["fault"]
        assert kill["first"]["status"] == -9 or fault == "time", kill["first"]["error"]
        assert len(kill["first"]["steps"]) <= 2
        same(wholes[kind], kill["second"])
        same(wholes[kind], kill["third"])
    return kills


def test_killed_while_writing(llama, bert, tmp_path):
    """At changes to files: late in six kinds of run, and once after the end."""
    shares = {"lora-sb": 0.45, "lora-xs": 0.7, "lora": 0.8, "lora-one": 0.9, "full": 0.96}
    faults = [[kind, "kill", share] for kind, share in shares.items()]
    check_kills(llama, bert, tmp_path, [*faults, ["classifier", "restart", 0.5]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_seventeen_times(kind, llama, bert, tmp_path):
    """102 kills in all, of which 18 of a run that had ended before."""
    faults = [[kind, "kill", (i + 0.5) / 12] for i in range(12)]
    faults += [[kind, "restart", share] for share in (0.1, 0.5, 0.9)]
    kills = check_kills(llama, bert, tmp_path, [*faults, [kind, "time", 0.4], [kind, "time", 0.8]])
    kept = [max(kill["first"]["steps"], default=0) for kill in kills[:12]]
    assert kept == sorted(kept), "the shares grow, and so does what is kept"
    assert kept[-1] == 6


def check_two_starts(llama, bert, folder, pauses):
    faults = [["lora-sb", "twice", pause] for pause in pauses]
    wholes, trials = outcomes(llama, bert, folder, faults)
    refused = 0
    for trial in trials:
        for (status, error), other in zip(trial["ends"], trial["processes"][::-1], strict=True):
            if status:
                assert f"is in use by process {other} on " in error, error
                assert error.startswith("ConfigError: output_dir ")
                refused += 1
        assert [status for status, _ in trial["ends"]].count(0) >= 1
        same(wholes["lora-sb"], trial["second"])
    assert refused >= len(trials) // 2, "they met"


def test_two_starts_in_one_folder(llama, bert, tmp_path):
    check_two_starts(llama, bert, tmp_path, (0, 0.5))


@pytest.mark.slow
def test_twenty_times_two_starts_in_one_folder(llama, bert, tmp_path):
    check_two_starts(llama, bert, tmp_path, [i / 20 for i in range(20)])


def test_a_full_disk_a_full_gpu_and_a_loss_that_is_no_number(llama, bert, tmp_path):
    faults = [["disk", 2], ["memory", 3], ["nan", 3], ["damaged", "trained.safetensors"]]
    faults = [["lora-sb", *fault] for fault in faults]
    wholes, (disk, memory, nan, damaged) = outcomes(llama, bert, tmp_path, faults)
    for outcome in (disk, memory, nan):
        assert outcome["first"]["status"] == 1
        assert outcome["first"]["steps"] == [2]
        assert not outcome["first"]["hidden"], "what was half written is gone"
        same(wholes["lora-sb"], outcome["second"])
    assert "safetensors cannot be written" in disk["first"]["error"]
    assert memory["first"]["error"].startswith("OutOfMemoryError")
    # In which of the two it shows first depends on the CPU's attention kernel.
    assert re.match("DivergedError: (loss|grad_norm) is nan at step 4", nan["first"]["error"])
    assert damaged["second"]["error"].startswith("CheckpointError")
    assert "trained.safetensors is damaged" in damaged["second"]["error"]
    assert damaged["untouched"]


def test_one_of_two_processes_dies(llama, bert, tmp_path):
    _, (outcome,) = outcomes(llama, bert, tmp_path, [["lora-sb", "worker", 3]])
    (survivor, error), (killed, _) = outcome["first"]
    assert killed == -9
    assert survivor == 1, "it does not go on alone"
    assert "gloo" in error.lower() or "closed by peer" in error.lower(), error
    assert outcome["steps"] == [2]
    assert "was written by 2 processes; expected as many, not 1" in outcome["alone"]["error"]
    assert [status for status, _ in outcome["second"]] == [0, 0], outcome["second"]
    whole, resumed = outcome["losses"]
    assert resumed == whole


@pytest.fixture
def sealed(tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 50)
    (tmp_path / "trainer_state.json").write_text("{}")
    seal(tmp_path, processes=2)
    check(tmp_path, processes=2)
    return tmp_path


@pytest.mark.parametrize("name", [*(f"{f}.safetensors" for f in FILES), "trainer_state.json"])
def test_every_file_of_a_checkpoint_is_checked(sealed, name):
    path = sealed / name
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    for damaged in (flipped, content[:-1], content + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged; .* remove .* to go on"):
            check(sealed, processes=2)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        check(sealed, processes=2)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"processes": 2, "files": 3}'])
def test_a_damaged_manifest_is_named(sealed, content):
    (sealed / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no usable manifest\.json"):
        check(sealed, processes=2)


def test_another_number_of_processes_is_another_run(sealed):
    with pytest.raises(CheckpointError, match="written by 2 processes; expected as many, not 4"):
        check(sealed, processes=4)


def test_other_rows_are_another_run(tmp_path):
    config = tiny_config("model", tmp_path)
    claim(tmp_path, config, sums(8))
    assert difference(tmp_path, config, sums(8)) is None
    for rows in (sums(7), sums(9)[1:]):
        words = f"data is {len(rows)} rows that are not those of the run"
        assert difference(tmp_path, config, rows).startswith(words)
    (tmp_path / "checkpoint-2").mkdir()
    for rows in (sums(7), sums(9)[1:]):
        with pytest.raises(ConfigError, match=f"data is {len(rows)} rows that are not those"):
            difference(tmp_path, config, rows)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    """Files and folders under the names that `utils.files` gives to incomplete ones."""
    for path in (tmp_path / "data.json", tmp_path / "adapter" / "adapter.safetensors"):
        with replacing(path) as unfinished:
            shutil.copy(unfinished, f"{unfinished}2")
        path.unlink()
    with atomic_folder(tmp_path / "checkpoint-4"):
        shutil.copytree(tmp_path, tmp_path / ".adapter.abcd1234")
    (tmp_path / ".gitignore").write_text("*")
    remove_remains(tmp_path)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert kept == {"adapter", "checkpoint-4", ".gitignore"}


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_settings_are_named(tmp_path, name, content):
    config = tiny_config("model", tmp_path)
    claim(tmp_path, config, sums(8))
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name.partition(".")[0]):
        difference(tmp_path, config, sums(8))
