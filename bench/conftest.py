"""Options, the device, and the recording of every measurement in the results.

    pytest bench/test_linear.py -k "mistral and both"
    pytest bench --grid full --results bench/results

pytest finds `bench/pytest.ini` by itself; pytest-benchmark is off in the tests and on here.
"""

import time

import pytest
import torch

from bench.environment import environment
from bench.recording import Case, Measurement, ReplayClock, rows, write
from lorasb_kernels.profiling.results import Row
from lorasb_kernels.profiling.roofline import Ceilings, measure_ceilings
from lorasb_kernels.utils.timing import median

CLOCK = ReplayClock()
ROWS = pytest.StashKey[list]()
STARTED = pytest.StashKey[float]()
SAVE_EVERY = 1.0  # seconds between writes of the results


def pytest_addoption(parser):
    group = parser.getgroup("lorasb")
    group.addoption(
        "--grid",
        choices=("tiny", "first", "headline", "full"),
        default="headline",
        help="which cases: tiny tries the path out; first, then headline, is what `make gpu` runs",
    )
    group.addoption("--results", metavar="FOLDER", help="add the results to this database")
    group.addoption(
        "--budget", type=float, metavar="SECONDS", help="skip what has not begun by then"
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stash[STARTED] = time.monotonic()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_runtest_setup(item):
    budget = item.config.getoption("--budget")
    if budget and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip(f"the budget of {budget:.0f} s is spent")


@pytest.fixture(scope="session")
def grid(request) -> str:
    return request.config.getoption("--grid")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def timing(grid) -> dict:
    """Keyword arguments of `timing.interleave`."""
    return {"rounds": 2, "burst_seconds": 1e-4} if grid == "tiny" else {"rounds": 15}


@pytest.fixture(scope="session")
def contenders_of(request):
    """`contenders_of(case)`: the contenders that this run selects for a case."""
    selected: dict[object, dict[str, None]] = {}
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in parameters:
            selected.setdefault(parameters["case"], {})[parameters["contender"]] = None
    return lambda case: list(selected[case])


class Recorder:
    """Passes measurements to pytest-benchmark and to the results database."""

    def __init__(self, config: pytest.Config, device: torch.device):
        self.folder = config.getoption("--results")
        self.tiny = config.getoption("--grid") == "tiny"
        self.rows: list[Row] = config.stash[ROWS]
        self.device = device
        self.environment = environment(device)
        self._ceilings: dict[str, Ceilings] = {}
        self._config = config
        self._announcements: list[str] = []
        self._saved = time.monotonic()

    def ceilings(self, dtype: str) -> Ceilings:
        """The device's ceilings, measured at first use."""
        if dtype not in self._ceilings:
            found = measure_ceilings(self.device, getattr(torch, dtype), tiny=self.tiny)
            self._ceilings[dtype] = found
            for quantity, value, unit in (
                ("bandwidth", found.bandwidth / 1e9, "GB/s"),
                ("rate", found.rate / 1e12, "TFLOP/s"),
            ):
                row = Row("ceiling", "", 0, 0, dtype, "torch", quantity, "p50", value, unit)
                self.rows.append(row)
        return self._ceilings[dtype]

    def record(self, benchmark, case: Case, contender: str, measured: Measurement) -> None:
        """Keeps a measurement."""
        ceilings = self.ceilings(case.dtype) if measured.launches else None
        found = rows(case, contender, measured, ceilings)
        self.rows += found
        benchmark.group = f"{case.op} {case.shape} M={case.tokens} r={case.r} {case.dtype}"
        benchmark.extra_info["contender"] = contender
        for row in found:
            if row.quantity != "time":
                benchmark.extra_info[f"{row.quantity} [{row.unit}]"] = row.value
        seconds = median(measured.samples)
        self._announcements.append(f"measured: {benchmark.group} {contender}: {seconds:.3g} s")
        CLOCK.load(measured.samples)
        benchmark.pedantic(CLOCK.advance, rounds=len(measured.samples))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the measurements since the last call; only then are they announced."""
        if self.folder and self.rows:
            write(self.folder, self.environment, self.rows)
            self.rows.clear()
            capture = self._config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                print("", *self._announcements, sep="\n", flush=True)
        self._announcements.clear()
        self._saved = time.monotonic()


@pytest.fixture(scope="session")
def recorder(request, device):
    recorder = Recorder(request.config, device)
    yield recorder
    recorder.save()


@pytest.fixture
def record(recorder, benchmark):
    """`record(case, contender, measurement)`."""

    def keep(case: Case, contender: str, measured: Measurement) -> None:
        recorder.record(benchmark, case, contender, measured)

    return keep
