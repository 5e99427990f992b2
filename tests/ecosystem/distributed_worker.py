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
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build

CONFIG = LoRASBConfig(r=4, init="orthogonal")


def adapted(dtype=torch.float32):
    return adapt(build("llama").to(dtype), CONFIG, progress=False)


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


def cores(model):
    whole = [
        p.full_tensor() if hasattr(p, "full_tensor") else p
        for p in (layer.lora_R.detach() for layer in adapted_layers(model).values())
    ]
    return torch.cat([core.reshape(-1) for core in whole])


def check_data_parallel(expected, rank):
    model = adapted()
    steps(DistributedDataParallel(model), trainable(model), batch(rank))
    torch.testing.assert_close(cores(model), expected)
    packed_model = adapted()
    packed = PackedCores(packed_model)
    steps(DistributedDataParallel(packed_model), [packed.parameter], batch(rank))
    torch.testing.assert_close(cores(packed_model), expected)


def check_fully_sharded(expected, rank, mesh, folder):
    model = adapted()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, trainable(model), batch(rank))
    torch.testing.assert_close(cores(model), expected)
    save_adapter(model, folder / f"rank{rank}")
    saved = load_file(folder / f"rank{rank}" / "adapter.safetensors")
    names = [f"{name}.lora_R" for name in adapted_layers(model)]
    torch.testing.assert_close(torch.cat([saved[n].reshape(-1) for n in names]), expected)
    check_loaded(model, folder / f"rank{rank}", mesh)


def check_loaded(sharded, adapter, mesh):
    """An adapter goes into a whole model, which is sharded afterwards."""
    with pytest.raises(ValueError, match=r"weight is sharded over ranks; expected load_adapter\("):
        load_adapter(sharded, adapter)
    model = load_adapter(build("llama"), adapter)
    fully_shard(model, mesh=mesh)
    assert torch.equal(cores(model), cores(sharded))


def check_mixed_dtypes(rank, mesh):
    """A bf16 base with fp32 cores shards; casting the cores is refused by name."""
    single, model = adapted(torch.bfloat16), adapted(torch.bfloat16)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
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
    """Weights that a tensor-parallel plan has cut are refused, by the layer's name."""
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
    expected = cores(single)
    assert not torch.equal(expected, cores(adapted()))
    check_data_parallel(expected, rank)
    check_fully_sharded(expected, rank, mesh, folder)
    check_mixed_dtypes(rank, mesh)
    check_tensor_parallel(mesh)
    dist.barrier()
    (folder / f"passed{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
