"""The choice of `expand`'s route: what decides, when it is measured, and that it then stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from lorasb_kernels.ops.measuring import running_operator
from lorasb_kernels.ops.triton import route_decision, route_files
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.route_decision import Shape, decide, planned, shape_of
from lorasb_kernels.ops.triton.route_files import RouteFile
from tests.ops.triton.routes import MEASURED_ON, StubTimer, device_file, entry, operands

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu measures the device")
ROOT = Path(__file__).parents[3]
SHAPE = Shape(torch.bfloat16, 8192, 4096, 4096, 96, transposed=False, dropout=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    for name in ("LORASB_TUNING", "LORASB_TUNE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(route_files, "_SAID", set())
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # the tests' own setting
    route_files.read_named.cache_clear()
    yield tmp_path
    torch.use_deterministic_algorithms(deterministic)


def key(arguments) -> str:
    x, weight, p, _, _, dropout, _ = arguments
    return shape_of(x, weight, p, dropout).key


def test_the_first_use_measures_and_every_later_one_keeps_to_it(caplog):
    timer = StubTimer("fused")
    first = decide(operands(20), RUN, device_file(), timer)
    assert (first.name, timer.calls) == ("fused", 1)
    assert "at M = 20 (nvidia-rtx-a6000-" in first.reason
    assert "two_call 2.0 µs, fused 1.0 µs" in first.reason
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("timing the routes of the frozen product on NVIDIA RTX A6000, once")
    other = StubTimer("two_call")
    again = decide(operands(31), RUN, device_file(), other)
    assert (again, other.calls) == (first, 0)
    decide(operands(33), RUN, device_file(), other)
    decide(operands(20, transposed=True), RUN, device_file(), other)
    decide(operands(20, transposed=True, dropout=0.1), RUN, device_file(), other)
    assert other.calls == 3, "other rows, the other weight and a mask are other classes"
    assert len(caplog.records) == 1


def test_ranks_that_tensor_maps_cannot_describe_are_a_class_of_their_own():
    """Measured without those routes, their entry would hide them from the other ranks."""
    keys = [SHAPE._replace(r=r).key for r in (96, 88, 90, 91)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert "r<=96 weight" in keys[0]
    assert "r<=96 unaligned weight" in keys[2]


def test_a_measurement_leaves_operands_and_random_numbers_alone():
    arguments = operands(20, transposed=True, dropout=0.3)
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    decide(arguments, RUN, device_file(), StubTimer("fused"))
    assert torch.equal(torch.rand(4), expected)
    after = [value for value in arguments if isinstance(value, torch.Tensor)]
    assert all(map(torch.equal, before, after))


def test_the_tile_of_a_route_is_its_fastest():
    def timer(calls, device):
        return {k: [1e-6 if k[1].BLOCK_N == 128 else 2e-6] for k in calls}

    assert decide(operands(20), RUN, device_file(), timer).tile.BLOCK_N == 128


def test_a_route_that_does_not_run_is_left_out(caplog):
    def broken(*_):
        raise ValueError("no such instruction")

    timer = StubTimer("fused")
    chosen = decide(operands(20), {**RUN, "fused": broken}, device_file(), timer)
    assert chosen.name == "two_call"
    assert "fused" not in device_file().read()[key(operands(20))].routes
    assert any("no such instruction" in record.message for record in caplog.records)


@pytest.mark.parametrize("fault", [1.5, float("nan")])
def test_a_route_that_computes_something_else_is_left_out(fault, caplog):
    def wrong(*arguments):
        return RUN["fused"](*arguments) * fault

    chosen = decide(operands(20), {**RUN, "fused": wrong}, device_file(), StubTimer("fused"))
    assert chosen.name == "two_call"
    assert "fused" not in device_file().read()[key(operands(20))].routes
    assert any("computes something else" in record.message for record in caplog.records)


def test_an_activation_that_overflowed_leaves_no_route_out():
    arguments = operands(20)
    arguments[0][3, 5] = float("inf")

    def timer(calls, device):
        return {key: [1e-6 if key[0] == "fused" else 2e-6] for key in calls}

    assert decide(arguments, RUN, device_file(), timer).name == "fused"


def test_without_memory_for_it_the_rule_decides(caplog):
    def full(*_):
        raise torch.OutOfMemoryError("40 GB")

    chosen = decide(operands(20), {**RUN, "two_call": full}, device_file(), StubTimer("fused"))
    assert "measuring it failed; by the rule" in chosen.reason
    assert device_file().read() == {}
    assert any("40 GB" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("off", "LORASB_TUNE is off"),
        ("compiled", "first used by a compiled graph"),
        ("deterministic", "first used in deterministic mode"),
        ("capturing", "first used while a CUDA graph was captured"),
    ],
)
def test_where_nothing_may_be_measured_the_rule_decides(reason, message, monkeypatch):
    if reason == "off":
        monkeypatch.setenv("LORASB_TUNE", "off")
    elif reason == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif reason == "capturing":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    timer = StubTimer("fused")
    with running_operator() if reason == "compiled" else torch.no_grad():
        chosen = decide(operands(20), RUN, device_file(), timer)
        assert timer.calls == 0
        assert message in chosen.reason
        assert "by the rule" in chosen.reason
        device_file().add({key(operands(20)): entry(two_call=2.0, fused=1.0)})
        chosen = decide(operands(20), RUN, device_file(), timer)
    known = "by the rule" if reason == "off" else "measured on 2026-01-02"
    assert known in chosen.reason, "what is known already is used, except with off"


def test_now_measures_anew_and_replaces(monkeypatch):
    decide(operands(20), RUN, device_file(), StubTimer("fused"))
    monkeypatch.setenv("LORASB_TUNE", "now")
    assert decide(operands(20), RUN, device_file(), StubTimer("two_call")).name == "two_call"
    monkeypatch.setenv("LORASB_TUNE", "once")
    assert decide(operands(20), RUN, device_file(), StubTimer("fused")).name == "two_call"


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("LORASB_TUNE", "always")
    with pytest.raises(ValueError, match="LORASB_TUNE is 'always'; expected one of"):
        decide(operands(20), RUN, device_file(), StubTimer("fused"))


def test_named_before_kept_before_shipped_before_measured(cache, monkeypatch):
    shape, timer = key(operands(20)), StubTimer("two_call")

    def write(path: Path, microseconds: float):
        found = entry(two_call=9.0, fused=microseconds)
        path.write_text(RouteFile("sm_86", MEASURED_ON, {shape: found}).text())

    monkeypatch.setattr(route_decision, "SHIPPED", cache)
    write(cache / "sm_86.json", 3.0)
    assert "fused 3.0" in decide(operands(20), RUN, device_file(), timer).reason
    device_file().add({shape: entry(two_call=9.0, fused=2.0)})
    assert "fused 2.0" in decide(operands(20), RUN, device_file(), timer).reason
    named = cache / "mine.json"
    write(named, 1.0)
    monkeypatch.setenv("LORASB_TUNING", str(named))
    assert "(mine.json): two_call 9.0 µs, fused 1.0" in (
        decide(operands(20), RUN, device_file(), timer).reason
    )
    monkeypatch.setenv("LORASB_TUNE", "now")
    assert "mine.json" in decide(operands(20), RUN, device_file(), timer).reason
    assert timer.calls == 0
    assert "mine.json" not in decide(operands(20), RUN, device_file("sm_80"), timer).reason


def test_the_named_file_must_be_usable(cache, monkeypatch):
    named = cache / "mine.json"
    monkeypatch.setenv("LORASB_TUNING", str(named))
    with pytest.raises(FileNotFoundError, match=r"LORASB_TUNING is .*mine\.json"):
        decide(operands(20), RUN, device_file(), StubTimer("fused"))
    named.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is not a file of measured routes"):
        decide(operands(20), RUN, device_file(), StubTimer("fused"))


def test_a_plan_measures_nothing():
    shape = shape_of(*(operands(20)[i] for i in (0, 1, 2)), 0.0)
    assert planned(shape, "sm_86", None, "not measured").reason.startswith("not measured; by the")
    assert device_file().read() == {}


def test_ranks_take_the_choice_of_the_first(tmp_path, monkeypatch):
    store, first, second = HashStore(), StubTimer("fused"), StubTimer("two_call")
    assert decide(operands(20), RUN, device_file(), first, store).name == "fused"
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path / "another node"))
    assert decide(operands(20), RUN, device_file(), second, store).name == "fused"
    assert (first.calls, second.calls) == (1, 0)


def test_ranks_do_not_wait_for_one_that_failed(caplog):
    def full(*_):
        raise torch.OutOfMemoryError("40 GB")

    store = HashStore()
    decide(operands(20), {**RUN, "two_call": full}, device_file(), StubTimer("fused"), store)
    chosen = decide(operands(20), RUN, device_file(), StubTimer("fused"), store)
    assert "measuring it failed; by the rule" in chosen.reason


def start(winner: str, *rows: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.ops.triton.calibrating", winner, *map(str, rows)]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[list[str], int]:
    routes, measured = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return routes.split(), int(measured)


def test_processes_that_measure_at_once_agree_afterwards():
    """Their timers disagree; the file is whole, holds all classes, and every process follows it."""
    rows = (5, 20, 40, 80)
    racing = [start("fused", *rows), start("two_call", *reversed(rows))]
    at_once = [outcome(process)[0] for process in racing]
    later = [outcome(start(winner, *rows)) for winner in ("fused", "two_call")]
    assert later[0] == later[1] == (at_once[0], 0)
    assert at_once[1] == list(reversed(at_once[0]))
    assert len(route_files.read_routes(device_file().path).expand) == len(rows)
    names = {path.suffix for path in device_file().path.parent.iterdir()}
    assert names == {".json", ".lock"}, "no partial file is left"
