"""Two processes (gloo) train as one process with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasb_kernels.train.run import finetune
from tests.train.conftest import sums, tiny_config

WORKER = """
import sys
from tests.train.conftest import sums, tiny_config
from lorasb_kernels.train.run import finetune
model, output_dir, method = sys.argv[1:]
finetune(tiny_config(model, output_dir, method=method, batch_size=4), sums(48))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("method", ["lora-sb", "lora"])
def test_two_processes_equal_one(method, llama, tmp_path):
    port = str(free_port())
    workers = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", WORKER, str(llama), str(tmp_path / "two"), method]
        workers.append(
            subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for worker in workers:
        output, _ = worker.communicate(timeout=600)
        assert worker.returncode == 0, output
    two = json.loads((tmp_path / "two" / "result.json").read_text())["losses"]
    config = tiny_config(llama, tmp_path / "one", method=method, batch_size=8)
    one = finetune(config, sums(48))[2].losses
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-3, atol=0)
