"""A save killed at any change to a file leaves the old adapter, the new one, or a named error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    completed = subprocess.run(
        [sys.executable, "-m", "tests.io.interrupted_saves", tmp_path_factory.mktemp("saves")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    return {line["kind"]: line for line in lines}


def test_steps_of_one_adapter_are_the_old_or_the_new(saves):
    outcomes = saves["steps"]["outcomes"]
    assert len(outcomes) > 2
    assert set(outcomes) == {"old", "new"}
    assert outcomes == sorted(outcomes, key=["old", "new"].index)


@pytest.mark.parametrize("kind", ["lora_alpha", "seed", "format 1", "first"])
def test_other_settings_or_another_subspace_never_mix(saves, kind):
    outcomes = saves[kind]["outcomes"]
    assert len(outcomes) > 6
    assert outcomes[-1] == "new"
    assert "neither" not in outcomes
    errors = [outcome for outcome in outcomes if outcome not in ("old", "new")]
    words = ("do not belong together", "is missing", "format")
    assert all(any(word in error for word in words) for error in errors), errors
    assert all(outcome == "old" for outcome in outcomes[:2]) or kind == "first"


def test_saving_again_mends_all(saves):
    for kind in saves.values():
        assert set(kind["again"]) == {"new"}
