"""Everything that needs a GPU, in at most nine minutes: `make gpu`.

    python -m bench.gpu                    tests, then all benchmarks if they are green
    python -m bench.gpu --part linear      one part; the tests must have been green before
    python -m bench.gpu --dry              the whole path on the CPU, with tiny shapes

Leaves under --out (or $OUT, else `bench/results/`): `<gpu>/<date>-<commit>.json`, the results;
`cache/routes/`, the measured routes of the frozen product; `gpu.log`, all output; and
`tests-passed`, which names the sources that the tests were green on.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 530
DRY_PATIENCE = 10  # a dry run shares a slow machine: the limits are this many times longer
# Largest number of seconds per part; a benchmark skips what has not started by 85 % of it.
LIMITS = {"tests": 200, "kernels": 120, "linear": 110, "init": 60, "train": 80}
BENCHMARKS = {
    "kernels": ("bench/test_kernels.py",),
    "linear": ("bench/test_linear.py",),
    "init": ("bench/test_init.py",),
    "train": ("bench/test_optimizer.py", "bench/test_train.py"),
}
GPU_TESTS = (
    "tests/gpu",
    "tests/ops",
    "tests/init/test_sign_matrix.py",
    "tests/nn/test_linear.py",
    "tests/nn/test_shared_input.py",
    "tests/bench/test_contenders.py",
)


@dataclass
class Session:
    """One call of `make gpu`.

    Args:
        out: folder of everything it leaves.
        dry: on the CPU with tiny shapes.
        deadline: `time.monotonic()` by which it ends.
        sources: digest of what the tests test.
    """

    out: Path
    dry: bool
    deadline: float
    sources: str

    def run(self, *command: str, limit: float, **environment: str) -> int:
        """Runs a command with output to the screen and the log; 124 if it took too long."""
        limit = min(limit, self.deadline - time.monotonic())
        self.say(f"$ {' '.join(command)}   (at most {max(limit, 0):.0f} s)")
        if limit <= 0:
            return 124
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **environment}
        if self.dry:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        else:
            variables["LORASB_CACHE"] = str(self.out / "cache")
        variables.pop("TRITON_INTERPRET", None)
        tee = subprocess.Popen(["tee", "-a", str(self.log)], stdin=subprocess.PIPE)
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=tee.stdin,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
            child.wait()
            self.say(f"stopped after {limit:.0f} s")
            return 124
        finally:
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

    @property
    def record(self) -> Path:
        return self.out / "tests-passed"


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *arguments)


def sources_digest() -> str:
    """Identifies what the tests test."""
    digest = hashlib.sha256()
    for folder, pattern in (("lorasb_kernels", "**/*.py"), ("csrc", "**/*.*")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_extension(session: Session) -> None:
    """Uses a CUDA extension that is newer than its sources, or builds one if there is nvcc."""
    library = ROOT / "lorasb_kernels" / "_C.so"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("**/*.*"))
    if library.exists() and library.stat().st_mtime >= newest:
        session.say("CUDA extension: up to date")
    elif session.dry:
        session.say("CUDA extension: not built in a dry run")
    elif find_tool("nvcc") is None:
        session.say("CUDA extension: not built, there is no nvcc; its tests will be skipped")
    else:
        command = python("setup.py", "build_ext", "--inplace")
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", this_architecture())
        code = session.run(*command, limit=150, LORASB_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=wanted)
        session.say("CUDA extension: built" if code == 0 else "CUDA extension: FAILED to build")


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or where toolkits are installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def this_architecture() -> str:
    """The compute capability of the first GPU, as TORCH_CUDA_ARCH_LIST takes it."""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def run_tests(session: Session) -> bool:
    """The GPU's tests, then the small cases under compute-sanitizer."""
    session.record.unlink(missing_ok=True)
    build_extension(session)
    command = python("-m", "pytest", "-q", "-rs", "-m", "not slow", "-p", "no:cacheprovider")
    if session.dry:
        green = session.run(*command, "tests/gpu", limit=600) == 0
        small = python("-m", "tests.gpu.small_cases", "--device", "cpu")
        green &= session.run(*small, limit=600) == 0
    else:
        if importlib.util.find_spec("xdist"):
            command += ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")
        green = session.run(*command, *GPU_TESTS, limit=LIMITS["tests"]) == 0
        green = sanitize(session) and green
    if green:
        session.record.write_text(session.sources + "\n", encoding="utf-8")
    return green


def sanitize(session: Session) -> bool:
    """compute-sanitizer over the small cases of every backend."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        session.say("compute-sanitizer: not installed, not run")
        return True
    green = True
    for tool in ("memcheck", "racecheck"):
        command = (sanitizer, "--tool", tool, "--error-exitcode", "86")
        # Without the caching allocator every tensor is its own allocation, so overruns are
        # detected.
        code = session.run(
            *command,
            *python("-m", "tests.gpu.small_cases"),
            limit=60,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        session.say(f"compute-sanitizer {tool}: {'clean' if code == 0 else f'exit code {code}'}")
        green &= code == 0
    return green


def run_benchmark(session: Session, part: str) -> bool:
    """The benchmarks of one part, their results added to the database."""
    limit = LIMITS[part] * (DRY_PATIENCE if session.dry else 1)
    if part == "kernels" and not session.dry:
        tune(session)
        limit -= 45
    command = python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
    grid = "tiny" if session.dry else "headline"
    options = ("--grid", grid, "--results", str(session.out), "--budget", f"{0.85 * limit:.0f}")
    # 5: nothing was collected, which is not a success here.
    return session.run(*command, *BENCHMARKS[part], *options, limit=limit) == 0


def tune(session: Session) -> None:
    """Measures the routes of the frozen product; the benchmarks that follow use them."""
    command = python("-m", "lorasb_kernels.cli.main", "tune", "--model", "mistral-7b")
    if session.run(*command, "--r", "96", "--tokens", "8192", limit=45) != 0:
        session.say("tune: not finished; the benchmarks run with the routes that are known")


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; returns 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=LIMITS, action="append", help="default all")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="default bench/results")
    options = parser.parse_args(arguments)
    out = Path(options.out or (ROOT / "out/gpu-dry" if options.dry else ROOT / "bench/results"))
    out.mkdir(parents=True, exist_ok=True)
    seconds = TOTAL_SECONDS * (DRY_PATIENCE if options.dry else 1)
    deadline = time.monotonic() + seconds
    session = Session(out.resolve(), options.dry, deadline, sources_digest())
    outcome = {}
    for part in options.part or LIMITS:
        begin = time.monotonic()
        if part == "tests":
            green = run_tests(session)
        elif not tests_passed(session):
            session.say(f"{part}: not run, as the tests were not green on these sources")
            green = False
        else:
            green = run_benchmark(session, part)
        outcome[part] = green
        word = "green" if green else "RED"
        session.say(f"== {part}: {word} after {time.monotonic() - begin:.0f} s")
    session.say(f"results: {session.out}")
    return 0 if all(outcome.values()) else 1


def tests_passed(session: Session) -> bool:
    """Whether the tests part was green on the sources as they are."""
    record = session.record
    return record.exists() and record.read_text(encoding="utf-8").strip() == session.sources


if __name__ == "__main__":
    sys.exit(main())
