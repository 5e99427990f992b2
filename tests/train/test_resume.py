"""A run that is killed at any moment and started again has the loss curve of an uninterrupted run.

The runs are separate processes, ended by SIGKILL: at a step, and while writing a checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorasb_kernels.train.run import finetune
from tests.train.conftest import sums, tiny_config

# Ends the process at the `when`-th call of `where`, a function that the trainer uses to save.
KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from tests.train.conftest import sums, tiny_config
    from lorasb_kernels.train import run, trainer
    from transformers import TrainerCallback

    model, output_dir, where, when = *sys.argv[1:4], int(sys.argv[4])

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class KillAtStep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if where == "step" and state.global_step == when:
                die()

    def dying(function):
        calls = 0
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == when:
                die()
            return function(*args, **kwargs)
        return wrapper

    if where == "write_tensors":        # a checkpoint without its tensors
        trainer.write_tensors = dying(trainer.write_tensors)
    elif where == "save_state":         # ... without its optimizer, scheduler or RNG
        trainer.save_state = dying(trainer.save_state)
    elif where == "rename":             # whole, but not in its place
        trainer.Path.rename = dying(trainer.Path.rename)
    run.finetune(
        tiny_config(model, output_dir, dropout=0.2, save_steps=3, max_steps=10, init_minimum=8),
        sums(40), callbacks=[KillAtStep()],
    )
    """
)


def run_killed(model: Path, output_dir: Path, where: str, when: int) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model), str(output_dir), where, str(when)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def resumed_config(model, output_dir):
    return tiny_config(model, output_dir, dropout=0.2, save_steps=3, max_steps=10, init_minimum=8)


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    _, _, result = finetune(resumed_config(llama, folder), sums(40))
    return result.losses


@pytest.mark.parametrize(
    ("where", "when", "left"),
    [
        ("step", 1, []),  # no checkpoint yet: the adapter is there, training starts again
        ("step", 8, [3, 6]),  # in the second epoch
        ("write_tensors", 2, [3]),
        ("save_state", 5, [3]),
        ("rename", 1, []),  # of the adapter
        ("rename", 3, [3]),
    ],
)
def test_a_killed_run_goes_on_with_the_same_losses(
    uninterrupted, llama, tmp_path, where, when, left
):
    run_killed(llama, tmp_path, where, when)
    found = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert found == left
    _, _, result = finetune(resumed_config(llama, tmp_path), sums(40))
    assert result.losses == uninterrupted
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 10
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_finished_run_is_not_trained_again(llama, tmp_path):
    first = finetune(resumed_config(llama, tmp_path), sums(40), sums(8))[2]
    again = finetune(resumed_config(llama, tmp_path), sums(40), sums(8))[2]
    assert again.losses == first.losses
    assert again.after == first.after
