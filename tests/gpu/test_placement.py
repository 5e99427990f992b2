"""The right device, the right stream, and offsets past 2³¹ elements."""

import pytest
import torch

from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.shrink import shrink
from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers
from tests.ops.operands import same_bits

DTYPE = torch.bfloat16


def normal(*shape, device, dtype=DTYPE):
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def test_tensors_on_a_device_that_is_not_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = []
    for index in (0, 1):
        workload = Workload(
            [[Layer("linear", 256, 256)]], 128, 24, DTYPE, torch.device("cpu"), seed=1
        )
        operands = workload.copies[0].groups[0][0]
        there = torch.device("cuda", index)
        moved = {name: value for name, value in vars(operands).items() if name != "scaling"}
        moved = {k: None if v is None else v.to(there) for k, v in moved.items()}
        with torch.cuda.device(0):
            x = workload.copies[0].inputs[0].detach().to(there).requires_grad_()
            R = moved.pop("lora_R").requires_grad_()
            y = lorasb_linear(x, lora_R=R, **moved, backend=backend)
            gradients = torch.autograd.grad(y, (x, R), workload.copies[0].dys[0].to(there))
        results.append([tensor.cpu() for tensor in (y.detach(), *gradients)])
    assert all(map(same_bits, *results))


def test_work_goes_to_the_current_stream(backend, device):
    workload = Workload([[Layer("linear", 512, 512)]], 256, 32, DTYPE, device)
    run = Run(lambda group: adapted_layers(group, backend), workload)
    expected = run.both(0)
    x = workload.copies[0].inputs[0]
    later = x.detach().clone()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.no_grad():
        x.zero_()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 30 ms: work on another stream would see zeros
        with torch.no_grad():
            x.copy_(later)
        found = run.both(0)
    side.synchronize()
    assert all(map(same_bits, expected, found))


def test_streams_at_once_give_the_results_of_one(backend, device):
    """M = 96 is split over blocks, which use counters that no other launch may share."""
    runs = []
    for seed in range(4):
        workload = Workload([[Layer("linear", 1024, 768)]], 96, 96, DTYPE, device, seed=seed)
        runs.append(Run(lambda group: adapted_layers(group, backend), workload))
    expected = [run.both(0) for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(20):
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run.both(0))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(map(same_bits, results, expected[i % len(runs)]))


@pytest.fixture
def far(device):
    """`far(columns)`: a [M, columns] view whose last rows are beyond 2³¹ elements."""
    M, stride = 300, 1 << 23
    if torch.cuda.mem_get_info(device)[0] < 2.2 * DTYPE.itemsize * M * stride:
        pytest.skip("needs 11 GB of free device memory")
    buffer = torch.empty(M * stride, dtype=DTYPE, device=device)

    def view(columns):
        rows = buffer.as_strided((M, columns), (stride, 1))
        rows.copy_(normal(M, columns, device=device))
        return rows

    return view


def test_rows_past_two_to_the_31(far, backend, device):
    x = far(256)
    A, R = normal(24, 256, device=device), normal(24, 24, device=device, dtype=torch.float32)
    W, B = normal(192, 256, device=device), normal(192, 24, device=device)
    h, p = shrink(x, A, R, 1.0, 0.0, None, backend)
    near = shrink(x.contiguous(), A, R, 1.0, 0.0, None, backend)
    assert all(map(same_bits, (h, p), near))
    y = expand(x, W, p, B, None, 0.0, None, backend)
    assert same_bits(y, expand(x.contiguous(), W, p, B, None, 0.0, None, backend))
    dy = far(192)
    found = core_backward(dy, h, B, R, 1.0, backend)
    assert all(map(same_bits, found, core_backward(dy.contiguous(), h, B, R, 1.0, backend)))
