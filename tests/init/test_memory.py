"""Free memory is reported, and free pages of the heap are returned to the system."""

import platform
from pathlib import Path

import pytest
import torch

from lorasb_kernels.init import EstimationOptions, estimate_updates
from lorasb_kernels.init.estimation.memory import free_memory, release_free_memory
from tests.init.models import Stack, linear_names, stack_batches, stack_loss

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_pages_between_tensors_that_stay_go_back_to_the_system():
    tensors = [torch.ones(25_000) for _ in range(400)]
    tensors = tensors[::10]  # 36 MB of holes
    before = resident_bytes()
    release_free_memory(CPU)
    assert before - resident_bytes() > 20e6
    assert all(tensor.eq(1).all() for tensor in tensors)


def test_layerwise_releases_memory_after_each_call_and_before_each_block(monkeypatch):
    released = []
    monkeypatch.setattr(
        "lorasb_kernels.init.estimation.layerwise.release_free_memory", released.append
    )
    model = Stack()
    options = EstimationOptions(strategy="layerwise", loss_fn=stack_loss)
    list(estimate_updates(model, stack_batches(), linear_names(model), options))
    batches, blocks = len(stack_batches()), len(model.blocks)
    assert released == [CPU] * (batches + blocks * (1 + batches))


def test_free_memory_of_the_host_is_known_where_linux_tells_it():
    free = free_memory(CPU)
    assert free is None or 0 <= free < 1 << 50
    assert (free is None) == (not Path("/proc/meminfo").exists())
