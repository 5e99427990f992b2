"""Forward and backward in a CUDA graph: replayed on new inputs they equal eager execution."""

import pytest
import torch

from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers
from tests.ops.operands import same_bits


@pytest.mark.parametrize("M", [64, 1024], ids=["split", "whole"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_captured_step_follows_its_inputs(M, shared, backend, device):
    group = [Layer("first", 512, 384), Layer("second", 512, 128)]
    workload = Workload([group], M, 24, torch.bfloat16, device)
    run = Run(lambda operands: adapted_layers(operands, backend, shared), workload)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.both(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run.both(0)
    for seed in range(3):
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for tensor in (*workload.copies[0].inputs, *workload.copies[0].dys):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device=device))
        graph.replay()
        assert all(map(same_bits, captured, run.both(0)))
