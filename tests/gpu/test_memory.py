"""Memory is as calculated: only h is kept, and nothing of the size of y exists twice."""

import pytest
import torch

from lorasb_kernels.profiling.shapes import PRESETS, Layer
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers

M, N, R = 16384, 4096, 96  # enough tokens to fill any GPU without splitting the contraction
DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize


def run(groups, backend, device, shared=False):
    workload = Workload(groups, M, R, DTYPE, device)
    return Run(lambda group: adapted_layers(group, backend, shared), workload)


def requested_peak(call) -> int:
    """Peak bytes requested from the allocator, beyond those held before."""
    call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - held


def test_forward_keeps_h_alone(backend, device):
    assert run([[Layer("linear", N, N)]], backend, device).saved_bytes() == M * R * SIZE


def test_a_block_keeps_h_of_each_layer(backend, device):
    preset = PRESETS["roberta-large"]
    kept = run(preset.groups, backend, device).saved_bytes()
    assert kept == len(preset.layers) * M * R * SIZE


def test_the_peak_of_forward_is_its_output_and_two_factors(device):
    one = run([[Layer("linear", N, N)]], "triton", device)
    expected = M * (N + 2 * R) * SIZE
    assert requested_peak(lambda: one.forward(0)) == pytest.approx(expected, rel=0.02)


def test_the_peak_of_backward_is_the_input_gradient_and_one_factor(device):
    one = run([[Layer("linear", N, N)]], "triton", device)
    expected = M * (N + R) * SIZE + R * R * 4
    assert requested_peak(lambda: one.backward(0)) == pytest.approx(expected, rel=0.02)
