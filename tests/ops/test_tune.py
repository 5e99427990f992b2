"""`tune`: the same measurement as at a first use, beforehand, for many shapes."""

import pytest
import torch

from lorasb_kernels.ops import extension
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.triton import route_measuring
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.route_decision import decide
from lorasb_kernels.ops.tune import random_operands, tune
from tests.ops.triton.routes import CPU, StubTimer, device_file

LAYERS = [LayerShape(M, m, n, 4) for M in (20, 40) for m, n in ((24, 40), (40, 24))]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu measures the device")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    for name in ("LORASB_TUNING", "LORASB_TUNE"):
        monkeypatch.delenv(name, raising=False)
    torch.use_deterministic_algorithms(False)


def tuned(layers, timer, **options):
    return tune(
        layers, dtype=torch.float32, device="cpu", kept=device_file(), timer=timer, **options
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_tuned_is_what_a_layer_then_takes(transposed, dropout):
    layer = LayerShape(20, 24, 40, 4, dropout)
    assert len(tuned([layer], StubTimer("fused"))) == 2
    later = StubTimer("two_call")
    operands = random_operands(layer, transposed, torch.float32, CPU)
    assert decide(operands, RUN, device_file(), later).name == "fused"
    assert later.calls == 0


def test_every_shape_is_measured_once_and_not_again():
    timer, lines = StubTimer("fused"), []
    new = tuned([*LAYERS, *LAYERS], timer, progress=lines.append)
    assert timer.calls == len(new) == len(lines) == 2 * len(LAYERS)
    assert ": fused, microseconds {'two_call': 2.0, 'fused': 1.0}" in lines[0]
    lines.clear()
    assert tuned(LAYERS, timer, progress=lines.append) == {}
    assert timer.calls == 2 * len(LAYERS)
    assert all(line.endswith("measured before") for line in lines)


def test_asked_for_anew_it_replaces(monkeypatch):
    tuned(LAYERS[:1], StubTimer("fused"))
    monkeypatch.setenv("LORASB_TUNE", "now")
    tuned(LAYERS[:1], StubTimer("two_call"))
    routes = [entry.routes for entry in device_file().read().values()]
    assert all(r["two_call"].microseconds < r["fused"].microseconds for r in routes)


def test_all_tiles_are_more_than_the_first(monkeypatch):
    monkeypatch.setattr(route_measuring, "SHORT_LIST", 1)
    tried = []

    def timer(calls, device):
        tried.append(len(calls))
        return {key: [1e-6] for key in calls}

    tuned(LAYERS[:1], timer)
    tuned(LAYERS[:1], timer, all_tiles=True)
    assert tried == [2, 2, 5, 5]


def test_the_extension_is_loaded_before_as_one_route_is_its_kernel(monkeypatch):
    events = []
    monkeypatch.setattr(extension, "obstacle", lambda: events.append("loaded"))
    tuned(LAYERS[:1], StubTimer("fused"), progress=events.append)
    assert events[0] == "loaded"
    assert len(events) == 3


@pytest.mark.parametrize("cut_short_after", [1, 3])
def test_what_was_measured_outlives_an_interruption(cut_short_after):
    stub = StubTimer("fused")

    def interrupted(calls, device):
        if stub.calls == cut_short_after:
            raise KeyboardInterrupt
        return stub(calls, device)

    with pytest.raises(KeyboardInterrupt):
        tuned(LAYERS, interrupted)
    assert len(device_file().read()) == cut_short_after


def without_memory_for(monkeypatch, route, N, K):
    """The operator of a route has no memory for products of this shape, as on a small device."""
    runs = RUN[route]

    def operator(x, weight, *others):
        if tuple(weight.shape) == (N, K):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return runs(x, weight, *others)

    monkeypatch.setitem(RUN, route, operator)


@pytest.mark.parametrize("route", ["two_call", "fused"])
def test_a_shape_without_memory_is_left_out_named_once_and_the_others_are_measured(
    route, monkeypatch, caplog
):
    lines = []
    with monkeypatch.context() as on_a_small_device:
        without_memory_for(on_a_small_device, route, 24, 40)
        new = tuned([*LAYERS, *LAYERS], StubTimer("fused"), progress=lines.append)
    # Of each number of rows, [24, 40] plain and transposed.
    assert len(new) == len(lines[:-1]) == 2 * len(LAYERS) - 4
    assert device_file().read().keys() == new.keys()
    assert not any("N=24 K=40" in key for key in new)
    assert lines[-1].startswith("not measured, out of memory: 4 of 8 products: ")
    assert lines[-1].count("N=24 K=40") == 4
    assert not caplog.messages

    again = tuned(LAYERS, StubTimer("fused"))
    assert all("N=24 K=40" in key for key in again), "the memory is there now"


def test_without_a_progress_what_has_no_memory_is_logged(monkeypatch, caplog):
    without_memory_for(monkeypatch, "two_call", 24, 40)
    tuned(LAYERS[:1], StubTimer("fused"))
    assert [m.partition(" products")[0] for m in caplog.messages] == [
        "not measured, out of memory: 1 of 2"
    ]


def test_it_needs_a_gpu_and_leave_to_measure(monkeypatch):
    with pytest.raises(RuntimeError, match="device is cpu; expected a CUDA device"):
        tune(LAYERS, device="cpu")
    monkeypatch.setenv("LORASB_TUNE", "off")
    with pytest.raises(ValueError, match="LORASB_TUNE is 'off'; expected 'once' or 'now'"):
        tuned(LAYERS, StubTimer("fused"))
    assert device_file().read() == {}
