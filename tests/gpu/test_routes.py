"""The choice of `expand`'s route on a device: measured at the first use, and kept."""

import pytest
import torch

import lorasb_kernels
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.triton import route_files
from lorasb_kernels.ops.triton.expand_route import forget_routes
from lorasb_kernels.ops.tune import tune


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    for name in ("LORASB_TUNING", "LORASB_TUNE"):
        monkeypatch.delenv(name, raising=False)
    route_files._device_file.cache_clear()
    forget_routes()
    yield
    route_files._device_file.cache_clear()
    forget_routes()


def expand_reason(r: int = 32) -> str:
    steps = lorasb_kernels.explain((512, 256, r), tokens=256, backend="triton").steps
    return next(step.reason for step in steps if step.operation == "expand")


def test_the_first_step_measures_and_the_next_processes_follow(device):
    layer = lorasb_kernels.LoRASBLinear(256, 512, 32, device=device, dtype=torch.bfloat16)
    x = torch.randn(256, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert expand_reason().startswith("not measured yet")
    first = layer(x)
    first.sum().backward()
    assert expand_reason().startswith("measured on ")
    kept = route_files.device_file(device).read()
    assert len(kept) == 2, "the forward product and the input gradient"
    forget_routes()
    assert torch.equal(layer(x), first)
    assert route_files.device_file(device).read() == kept


def test_tuning_on_the_device(device):
    assert len(tune([LayerShape(256, 512, 256, 32)])) == 2
    assert expand_reason().startswith("measured on ")


def test_a_capture_measures_nothing(device):
    layer = lorasb_kernels.LoRASBLinear(256, 512, 32, device=device, dtype=torch.bfloat16)
    x = torch.randn(256, 256, device=device, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        layer(x)
    assert route_files.device_file(device).read() == {}
    assert "while a CUDA graph was captured" in expand_reason()
