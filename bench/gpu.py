"""Everything that needs a GPU, in at most nine minutes, what is worth most first: `make gpu`.

    python -m bench.gpu                    all parts
    python -m bench.gpu --part linear      one part
    python -m bench.gpu --dry              the whole path on the CPU, with tiny shapes

It can be interrupted at any moment. Every result is on disk before it is announced, in
`<gpu>/<date>-<commit>.json` under --out (or $OUT, else `bench/results/`). Beside it: `gpu.log`, all
output, and `cache/routes/`, the measured routes of the frozen product. A part that is cut off at
its limit is no failure.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.environment import COMMIT, DATE, commit, date
from bench.extension import find_tool

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530
DRY_PATIENCE = 10  # a dry run shares a slow machine: the limits are this many times longer
CUT_OFF = 124
TESTS = (
    "tests/gpu",
    "tests/ops",
    "tests/init/test_sign_matrix.py",
    "tests/nn/test_linear.py",
    "tests/nn/test_shared_input.py",
    "tests/bench/test_contenders.py",
)


class Interrupts:
    """Within it SIGINT and SIGTERM raise KeyboardInterrupt; from `hold` on, at `release`."""

    def __init__(self):
        self._held = self._came = False

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_) -> None:
        self._came = True
        if not self._held:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """Until `release`: a child that nobody knows of yet would outlive this process."""
        self._held = True

    def release(self) -> None:
        """Raises KeyboardInterrupt if a signal came meanwhile."""
        self._held = False
        if self._came:
            raise KeyboardInterrupt


@dataclass
class Session:
    """One call of `make gpu`.

    Args:
        out: folder of everything it leaves.
        dry: on the CPU with tiny shapes.
        deadline: `time.monotonic()` by which it ends.
        interrupts: how it is stopped.
        named: the date and commit that it began with, for the environment of its processes: the
            name of its file, also after midnight.
    """

    out: Path
    dry: bool
    deadline: float
    interrupts: Interrupts = field(default_factory=Interrupts)
    named: dict[str, str] = field(default_factory=lambda: {DATE: date(), COMMIT: commit()})

    def run(self, *command: str, limit: float, **environment: str) -> int:
        """Runs a command with output to the screen and the log; `CUT_OFF` if it took too long."""
        limit = min(limit, self.deadline - time.monotonic())
        self.say(f"$ {' '.join(command)}   (at most {max(limit, 0):.0f} s)")
        if limit <= 0:
            return CUT_OFF
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        variables |= {"LORASB_CACHE": str(self.out / "cache"), **self.named}
        variables |= environment
        if self.dry:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables.pop("TRITON_INTERPRET", None)
        self.interrupts.hold()
        tee = subprocess.Popen(
            ["tee", "-a", str(self.log)], stdin=subprocess.PIPE, start_new_session=True
        )
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=tee.stdin,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.interrupts.release()
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            self.say(f"stopped after {limit:.0f} s")
            return CUT_OFF
        finally:  # also when this process is interrupted
            end(child)
            tee.stdin.close()
            tee.wait()

    def say(self, text: str) -> None:
        """A line on the screen and in the log."""
        print(text, flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    @property
    def log(self) -> Path:
        return self.out / "gpu.log"


def end(child: subprocess.Popen) -> None:
    """Ends a process and its workers: it may save what it has for some seconds."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
    with contextlib.suppress(ProcessLookupError):  # workers may be left where the child is not
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """A command that runs tests or benchmarks."""
    return python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments)


def smoke(session: Session, limit: float) -> int:
    """A layer and siblings on every backend against float64, and a CUDA graph of them."""
    tests = ("tests/gpu/test_smoke.py", "tests/gpu/test_graphs.py")
    code = session.run(*pytest(*tests), limit=limit)
    if code != CUT_OFF:
        show(session, "--smoke-tests", "green" if code == 0 else "red")
    return code


def headline(session: Session, limit: float) -> int:
    """A block at 512 tokens in a CUDA graph and at 8192, frozen, in cuBLAS calls, and ours."""
    only = ("-k", "both") if session.dry else ()  # `linear` has the other passes
    code = benchmark(session, limit, "bench/test_linear.py", *only, grid="first")
    show(session)
    return code


def tune(session: Session, limit: float) -> int:
    """The routes of the frozen product for all shapes of Mistral-7B."""
    if session.dry:
        session.say("tune: needs a CUDA device, nothing else is timed")
        return 0
    command = python("-m", "lorasb_kernels.cli.main", "tune", "--model", "mistral-7b")
    return session.run(*command, "--tokens", "8192", "512", limit=limit)


def benchmark(session: Session, limit: float, *selected: str, grid: str = "headline") -> int:
    """Benchmarks, which skip what has not begun by 85 % of the limit."""
    grid = "tiny" if session.dry else grid
    options = ("--grid", grid, "--results", str(session.out), "--budget", f"{0.85 * limit:.0f}")
    return session.run(*pytest(*selected, *options), limit=limit)


def tests(session: Session, limit: float) -> int:
    """The tests of operators, layers and memory on the GPU."""
    if session.dry:
        small = session.run(*python("-m", "tests.gpu.small_cases", "--device", "cpu"), limit=limit)
        return small or session.run(*pytest("-m", "not slow", "tests/gpu"), limit=limit)
    workers = ()
    if importlib.util.find_spec("xdist"):
        workers = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")
    return session.run(*pytest("-m", "not slow", *workers, *TESTS), limit=limit)


def sanitize(session: Session, limit: float) -> int:
    """compute-sanitizer over the small cases of every backend."""
    sanitizer = find_tool("compute-sanitizer")
    if session.dry or sanitizer is None:
        session.say(f"compute-sanitizer: not {'run on a CPU' if session.dry else 'installed'}")
        return 0
    codes = []
    for tool in ("memcheck", "racecheck"):
        command = (sanitizer, "--tool", tool, "--error-exitcode", "86")
        # Without the caching allocator every tensor is its own allocation, so overruns are
        # detected.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LORASB_TUNE": "off"}
        small = python("-m", "tests.gpu.small_cases")
        codes.append(session.run(*command, *small, limit=limit / 2, **environment))
    return next((code for code in codes if code not in (0, CUT_OFF)), max(codes))


def show(session: Session, *options: str) -> None:
    """Prints the table of what is known."""
    command = python("-m", "bench.headline", str(session.out), *options)
    session.run(*command, limit=60)


def of_files(*files: str) -> Callable[[Session, float], int]:
    """A part that runs benchmarks."""
    return lambda session, limit: benchmark(session, limit, *files)


@dataclass(frozen=True)
class Part:
    """What runs for at most `seconds`; `run` returns an exit status."""

    seconds: float
    run: Callable[[Session, float], int]


# In the order of worth.
PARTS = {
    "smoke": Part(40, smoke),
    "headline": Part(70, headline),
    "tune": Part(45, tune),
    "kernels": Part(75, of_files("bench/test_kernels.py")),
    "linear": Part(90, of_files("bench/test_linear.py")),
    "init": Part(50, of_files("bench/test_init.py")),
    "train": Part(
        90, of_files("bench/test_train.py", "bench/test_optimizer.py", "bench/test_experts.py")
    ),
    "tests": Part(200, tests),
    "sanitizer": Part(60, sanitize),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns 1 if one of them failed, 130 if it was interrupted, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default all")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="default bench/results")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; expected one, or --dry (make gpu DRY=1)")
    out = Path(options.out or (ROOT / "out/gpu-dry" if options.dry else ROOT / "bench/results"))
    out.mkdir(parents=True, exist_ok=True)
    patience = DRY_PATIENCE if options.dry else 1
    deadline = time.monotonic() + TOTAL_SECONDS * patience
    session = Session(out.resolve(), options.dry, deadline)
    failed = []
    with session.interrupts:
        try:
            for name in options.part or PARTS:
                begin = time.monotonic()
                code = PARTS[name].run(session, PARTS[name].seconds * patience)
                outcome = {0: "green", CUT_OFF: "cut off, not finished"}.get(code, "RED")
                failed += [name] if outcome == "RED" else []
                session.say(f"== {name}: {outcome} after {time.monotonic() - begin:.0f} s")
        except KeyboardInterrupt:
            session.say(f"== interrupted; the results so far are in {session.out}")
            return 130
        session.deadline += 60  # for the table alone
        show(session)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
