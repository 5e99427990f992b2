"""Counted bytes and flops equal those that PyTorch's operations move and compute."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.contenders import CONTENDERS
from bench.models import configuration, random_model
from lorasb_kernels.hardware.gpus import GPUS, find_gpu
from lorasb_kernels.profiling import costs
from lorasb_kernels.profiling.roofline import Ceilings, datasheet_ceilings, measure_ceilings
from lorasb_kernels.profiling.shapes import PRESETS, TINY, Layer
from lorasb_kernels.profiling.workload import Run, Workload
from lorasb_kernels.targets import find_targets

VIEWS = ("t", "view", "_unsafe_view", "detach", "transpose", "expand", "alias")


class Counter(TorchDispatchMode):
    """Bytes into and out of every operation except views, and flops of the matrix products."""

    def __init__(self):
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        if name == "mm":
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        return result


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("name", ["frozen", "published"])
def test_launches_of_eager_code(name, which):
    workload = Workload([[Layer("linear", 96, 80)]], 64, 16, torch.bfloat16, torch.device("cpu"))
    run = Run(CONTENDERS[name].build, workload)
    with Counter() as seen:
        getattr(run, which)(0)
    counted = costs.total(workload.launches(name, which))
    assert seen.bytes == counted.bytes
    elementwise = 64 * {"forward": 2 * 80, "both": 3 * 80 + 96}[which]
    assert counted.flops - seen.flops == (elementwise if name == "published" else 0)


def test_an_adapter_costs_three_percent_of_flops():
    M, n, r = 8192, 4096, 64
    frozen, fused = (
        costs.total(costs.WAYS[w](M, n, n, r, 2).of("both")) for w in ("frozen", "fused")
    )
    assert fused.flops / frozen.flops - 1 == pytest.approx(2 * r / n, rel=0.05)


def test_shrink_reads_x_once():
    cost = costs.shrink(8192, 4096, 96, 2)
    assert cost.bytes == 2 * (8192 * 4096 + 96 * 4096 + 2 * 8192 * 96) + 4 * 96 * 96


def test_planes_are_a_sixteenth_of_fp32():
    assert costs.pack_signs(64, 64).bytes == 4 * 64 * 64 * (1 + 1 / 16)


def test_floor_takes_the_slower_of_memory_and_compute():
    ceilings = Ceilings(bandwidth=10.0, rate=100.0, source="")
    assert ceilings.floor([costs.Cost(20, 100), costs.Cost(5, 300)]) == 2 + 3
    assert ceilings.bound(costs.Cost(20, 100)) == "memory"
    assert ceilings.bound(costs.Cost(5, 300)) == "compute"


def test_gpus_are_found_by_key_and_by_device_name():
    for key, gpu in GPUS.items():
        assert find_gpu(key) is gpu
        assert find_gpu(gpu.device_name) is gpu
        assert gpu.source
    with pytest.raises(ValueError, match="gpu is 'abacus'; expected one of a6000"):
        find_gpu("abacus")


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("NVIDIA H", ["h100 (NVIDIA H100 80GB HBM3)", "h200 (NVIDIA H200)"]),
        ("NVIDIA H100", ["h100 (NVIDIA H100 80GB HBM3)"]),
        ("NVIDIA H200 NVL", ["h200 (NVIDIA H200)"]),  # of other bandwidth
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ["rtx4090 (NVIDIA GeForce RTX 4090)"]),
    ],
)
def test_a_part_of_a_gpus_name_is_refused_with_the_candidates(name, candidates):
    with pytest.raises(ValueError, match=f"gpu is {name!r}; expected") as raised:
        find_gpu(name)
    assert str(raised.value).endswith(f"the whole name of one of {', '.join(candidates)}")


def test_datasheet_rate_follows_the_dtype():
    a6000 = GPUS["a6000"]
    assert datasheet_ceilings(a6000, "float32").rate < datasheet_ceilings(a6000, "bfloat16").rate


def test_measured_ceilings_are_measured():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, tiny=True)
    assert ceilings.source == "measured"
    assert math.isfinite(ceilings.bandwidth)
    assert ceilings.rate > 0


@pytest.mark.parametrize("preset", [*PRESETS.values(), TINY], ids=lambda preset: preset.key)
def test_presets_are_the_models_they_name(preset):
    model = random_model(preset.key, torch.device("meta"), torch.bfloat16, layers=1)
    shapes = [tuple(m.weight.shape) for m in find_targets(model, "all-linear").values()]
    assert sorted(shapes) == sorted((layer.m, layer.n) for layer in preset.layers)
    assert configuration(preset.key).num_hidden_layers == preset.blocks
    biased = any(m.bias is not None for m in find_targets(model, "all-linear").values())
    assert biased == preset.bias
