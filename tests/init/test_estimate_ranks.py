"""Data-parallel ranks: the sign of the sum over all ranks; they fail together and never hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasb_kernels.init import EstimationOptions, estimate_updates
from tests.init.models import Stack, linear_names, stack_batches, stack_loss

ROOT = Path(__file__).parents[2]


def run_ranks(folder: Path, case: str) -> list[str]:
    """Runs two gloo processes and returns what each printed."""
    command = [sys.executable, "-m", "tests.init.ranks_worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder), case],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
    return outputs


def results(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["layerwise", "wrapped", "out of memory on rank 1"])
def test_two_ranks_give_the_signs_of_all_samples(case, tmp_path):
    outputs = run_ranks(tmp_path, case)
    names = linear_names(Stack())
    wanted = dict(
        estimate_updates(
            Stack(), stack_batches((3, 2)), names, EstimationOptions(loss_fn=stack_loss)
        )
    )
    for found in results(tmp_path):
        assert set(found) == set(names)
        for name in names:
            assert torch.equal(found[name], wanted[name].to_dense()), name
    alone = dict(
        estimate_updates(
            Stack(), stack_batches((3, 2))[:1], names, EstimationOptions(loss_fn=stack_loss)
        )
    )
    assert alone != wanted
    if case == "out of memory on rank 1":
        assert "'resident' gave up: another rank fell back; using 'layerwise'" in outputs[0]
        assert "'resident' gave up: out of memory" in outputs[1]


def test_a_failure_on_one_rank_ends_both(tmp_path):
    first, second = run_ranks(tmp_path, "fails on rank 1")
    assert "RuntimeError: estimation failed on another rank" in first
    assert "ValueError: batches is empty" in second


@pytest.mark.slow
def test_a_loss_that_diverges_on_one_rank_ends_both(tmp_path):
    first, second = run_ranks(tmp_path, "diverges on rank 1")
    assert "RuntimeError: estimation failed on another rank" in first
    assert "FloatingPointError: the loss of batch 0 is nan" in second


def test_sharded_models_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    try:
        model = Stack()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="model is sharded by FSDP, so no rank holds whole"):
            estimate_updates(
                model, stack_batches(), ["before"], EstimationOptions(loss_fn=stack_loss)
            )
    finally:
        dist.destroy_process_group()
