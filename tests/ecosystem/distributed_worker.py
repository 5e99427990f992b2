"""One of the processes that `test_distributed` starts with torchrun."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lorasb_kernels import LoRASBConfig, PackedCores, adapt, load_adapter, save_adapter
from tests.models import batches, build

CONFIG = LoRASBConfig(r=4, init="orthogonal")


def adapted(dtype=torch.float32, config=CONFIG, samples=None):
    return adapt(build("llama").to(dtype), config, samples, learning_rate=1e-3, progress=False)


def batch(share=None):
    """The whole batch of four rows, or the half of one rank."""
    ids = batches("llama", 1, size=5, seed=3)[0]["input_ids"][1:]
    ids = ids if share is None else ids.chunk(2)[share]
    return {"input_ids": ids, "labels": ids}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(model, parameters, data):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model):
    """The values of all trained parameters, in one tensor."""
    whole = [
        p.full_tensor() if hasattr(p, "full_tensor") else p
        for p in (parameter.detach() for parameter in trainable(model))
    ]
    return torch.cat([values.reshape(-1) for values in whole])


def sharded(model, mesh):
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_data_parallel(expected, rank):
    model = adapted()
    steps(DistributedDataParallel(model), trainable(model), batch(rank))
    torch.testing.assert_close(trained(model), expected)
    packed_model = adapted()
    packed = PackedCores(packed_model)
    steps(DistributedDataParallel(packed_model), [packed.parameter], batch(rank))
    torch.testing.assert_close(trained(packed_model), expected)


def check_fully_sharded(expected, rank, mesh, folder):
    model = sharded(adapted(), mesh)
    steps(model, trainable(model), batch(rank))
    torch.testing.assert_close(trained(model), expected)
    save_adapter(model, folder / f"rank{rank}")
    saved = load_file(folder / f"rank{rank}" / "adapter.safetensors")
    torch.testing.assert_close(saved["cores"].reshape(-1), expected)
    with pytest.raises(ValueError, match=r"is sharded over ranks; expected save_adapter\(\)"):
        model.save_pretrained(folder / "pretrained")
    check_loaded(model, folder / f"rank{rank}", mesh)


def check_loaded(saved_model, adapter, mesh):
    """An adapter goes into a whole model, which is sharded afterwards."""
    with pytest.raises(ValueError, match=r"weight is sharded over ranks; expected load_adapter\("):
        load_adapter(saved_model, adapter)
    model = sharded(load_adapter(build("llama"), adapter), mesh)
    assert torch.equal(trained(model), trained(saved_model))


def check_other_methods(rank, mesh):
    """LoRA-SB starts from the gradients of both ranks, LoRA trains A and B; with both wrappers
    they give the result of one process."""
    for config in (LoRASBConfig(r=4), LoRASBConfig(r=4, init="lora")):
        # If both ranks have the whole batch, it is summed twice: the sign is that of one process.
        single = adapted(config=config, samples=[batch()])
        steps(single, trainable(single), batch())
        parallel = adapted(config=config, samples=[batch(rank)])
        steps(DistributedDataParallel(parallel), trainable(parallel), batch(rank))
        torch.testing.assert_close(trained(parallel), trained(single))
        split = sharded(adapted(config=config, samples=[batch(rank)]), mesh)
        steps(split, trainable(split), batch(rank))
        torch.testing.assert_close(trained(split), trained(single))


def check_mixed_dtypes(rank, mesh):
    """A bf16 base with fp32 cores shards; casting the cores is refused by name."""
    single, model = adapted(torch.bfloat16), sharded(adapted(torch.bfloat16), mesh)
    with torch.no_grad():
        expected = single(**batch(rank)).logits
    logits = model(**batch(rank)).logits
    assert torch.equal(logits, expected)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trainable(model))
    cast = adapted()
    fully_shard(cast, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"lora_\w has dtype .*; expected torch"):
        cast(**batch(rank))


def check_tensor_parallel(mesh):
    """Weights that a tensor-parallel plan has split are refused, by the layer's name."""
    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is a DTensor"):
        adapt(model, CONFIG, progress=False)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    single = adapted()
    steps(single, trainable(single), batch())
    expected = trained(single)
    assert not torch.equal(expected, trained(adapted()))
    check_data_parallel(expected, rank)
    check_fully_sharded(expected, rank, mesh, folder)
    check_other_methods(rank, mesh)
    check_mixed_dtypes(rank, mesh)
    check_tensor_parallel(mesh)
    dist.barrier()
    (folder / f"passed{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
