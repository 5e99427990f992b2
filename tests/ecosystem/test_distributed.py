"""DDP, FSDP2 and tensor parallelism, in two gloo processes that torchrun starts."""

import subprocess
import sys
from pathlib import Path


def test_two_processes_under_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = ["--nproc-per-node", "2", "-m", "tests.ecosystem.distributed_worker", str(tmp_path)]
    done = subprocess.run(
        [*launcher, *worker],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"passed0", "passed1"}
