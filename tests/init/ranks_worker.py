"""One data-parallel rank of `test_estimate_ranks`, run as a script: rank, world, folder, case."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorasb_kernels.init import EstimationOptions, estimate_updates
from tests.init.models import Stack, linear_names, stack_batches, stack_loss


def estimate(rank: int, case: str) -> dict[str, torch.Tensor]:
    model, loss, strategy = Stack(), stack_loss, case
    first, second = stack_batches((3, 2))
    batches = list(first.split([2, 1])) if rank == 0 else [second]
    if case == "wrapped":
        model, strategy = DistributedDataParallel(model), "resident"
    if case == "fails on rank 1":
        strategy = "resident"
        batches = batches if rank == 0 else []
    if case == "diverges on rank 1":
        strategy = "resident"
        batches = batches if rank == 0 else [second * float("nan")]
    if case == "out of memory on rank 1":
        strategy = "resident"

        def loss(model, batch):
            if rank == 1 and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return stack_loss(model, batch)

        failed = []
    names = linear_names(Stack())
    updates = estimate_updates(
        model, batches, names, EstimationOptions(strategy=strategy, loss_fn=loss)
    )
    return {name: signs.to_dense(torch.float32) for name, signs in updates}


def main() -> None:
    rank, world, folder, case = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = estimate(rank, case)
            torch.save(result, folder / f"{rank}.pt")
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    print(*(str(warning.message) for warning in caught), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
