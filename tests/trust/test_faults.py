"""However a run ends, the next start gives the curve of the uninterrupted run or a clear error.

No silent restart, no partial checkpoint under a checkpoint's name, and no complete
checkpoint is lost except by the rule that keeps a fixed number. `killed_runs` makes the faults.
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
from lorasb_kernels.train.output_folder import claim, is_claimed, remove_remains
from lorasb_kernels.utils.files import atomic_folder, replacing
from tests.train.conftest import sums, tiny_config

ROOT = Path(__file__).resolve().parents[2]
FILES = ("trained", "optimizer", "scheduler", "rng-0")


def outcomes(model, folder, faults) -> tuple[dict, list[dict]]:
    """The uninterrupted run, and the outcome of each fault."""
    completed = subprocess.run(
        [sys.executable, "-m", "tests.trust.killed_runs", model, folder, json.dumps(faults)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(faults) + 1
    return lines[0], lines[1:]


def goes_on(whole: dict, outcome: dict) -> None:
    second = outcome["second"]
    assert second["status"] == 0, second["error"]
    assert second["losses"] == whole["losses"]
    assert not second["remains"]


def check_kills(model, folder, shares, times):
    faults = [["kill", share] for share in shares] + [["time", share] for share in times]
    whole, kills = outcomes(model, folder, faults)
    newest = 0
    for outcome in kills:
        goes_on(whole, outcome)
        if outcome["fault"][0] == "kill":  # the shares grow, and so does what is kept
            first = outcome["first"]
            assert first["status"] == -9, first["error"]
            assert len(first["steps"]) <= 2
            assert max(first["steps"], default=0) >= newest
            newest = max(first["steps"], default=0)
    assert newest == 6


def test_killed_while_writing(llama, tmp_path):
    """At changes to files spread over the run, most of them inside a checkpoint."""
    check_kills(llama, tmp_path, (0.45, 0.6, 0.96), (0.7,))


@pytest.mark.slow
def test_killed_sixty_times(llama, tmp_path):
    shares = [(i + 0.5) / 50 for i in range(50)]
    check_kills(llama, tmp_path, [*shares, 0.999], [i / 10 for i in range(1, 10)])


def test_a_full_disk_a_full_gpu_and_a_loss_that_is_no_number(llama, tmp_path):
    faults = [["disk", 2], ["memory", 3], ["nan", 3], ["damaged", "trained.safetensors"]]
    whole, (disk, memory, nan, damaged) = outcomes(llama, tmp_path, faults)
    for outcome in (disk, memory, nan):
        assert outcome["first"]["status"] == 1
        assert outcome["first"]["steps"] == [2]
        assert not outcome["first"]["hidden"], "what was half written is gone"
        goes_on(whole, outcome)
    assert "safetensors cannot be written" in disk["first"]["error"]
    assert memory["first"]["error"].startswith("OutOfMemoryError")
    # In which of the two it shows first depends on the CPU's attention kernel.
    assert re.match("DivergedError: (loss|grad_norm) is nan at step 4", nan["first"]["error"])
    assert damaged["second"]["error"].startswith("CheckpointError")
    assert "trained.safetensors is damaged" in damaged["second"]["error"]
    assert damaged["untouched"]


def test_one_of_two_processes_dies(llama, tmp_path):
    _, (outcome,) = outcomes(llama, tmp_path, [["worker", 3]])
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
    assert not is_claimed(tmp_path, config, sums(8))
    claim(tmp_path, config, sums(8))
    assert is_claimed(tmp_path, config, sums(8))
    with pytest.raises(ConfigError, match="data is 7 rows that are not those of the run"):
        is_claimed(tmp_path, config, sums(7))
    with pytest.raises(ConfigError, match="data is 8 rows"):
        is_claimed(tmp_path, config, sums(9)[1:])


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
        is_claimed(tmp_path, config, sums(8))
