"""`make gpu DRY=1`: the whole path without a GPU, so that it works at the first run on one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import environment, extension, gpu, test_linear
from lorasb_kernels.profiling.results import read_all

ROOT = Path(__file__).parents[2]
LAST = ("tests", "sanitizer")


@pytest.mark.slow  # the quick tests interrupt such a run instead
def test_dry_run(tmp_path):
    code = gpu.main(["--dry", "--out", str(tmp_path)])
    log = (tmp_path / "gpu.log").read_text()
    assert code == 0, log
    assert re.findall(r"^== (\w+): green", log, re.MULTILINE) == list(gpu.PARTS)
    assert "needs a CUDA device" in log
    (found,) = read_all(tmp_path)
    assert found.environment.gpu.startswith("cpu")
    ops = {row.op for row in found.rows}
    assert {"ceiling", "kernel.shrink", "block.both", "init.svd", "init.model"} <= ops
    assert {"train.step", "optimizer.step", "experts.both", "tests"} <= ops
    times = found.select(op="block.both", quantity="time", quantile="p50")
    assert {"frozen", "published", "peft", "lorasb reference"} <= {row.contender for row in times}
    steps = {row.contender for row in found.select(op="train.step", quantile="p50")}
    assert {"full fine-tuning", "peft r=32, autocast", "lorasb auto, shared input"} <= steps
    assert "liger_kernel is not installed" in log or "liger_kernel needs a CUDA device" in log
    assert announced(log) == stored(tmp_path), "every result is announced, and no other"
    *_, last = log.rstrip().splitlines()
    (path,) = tmp_path.glob("cpu*/*.json")
    assert last == f"Send this file: {path}"
    assert "| LoRA-SB by this library, plain PyTorch " in log


def announced(log: str) -> set[str]:
    """What the log says was measured."""
    return set(re.findall(r"^measured: (.*): \S+ s$", log, re.MULTILINE))


def stored(folder: Path) -> set[str]:
    """What is in the results, in the words of the log."""
    return {
        f"{row.op} {row.shape} M={row.tokens} r={row.r} {row.dtype} {row.contender}"
        for found in read_all(folder)
        for row in found.select(quantity="time", quantile="p50")
    }


@pytest.mark.parametrize(
    ("stop", "after"),
    [(signal.SIGKILL, 1), (signal.SIGTERM, 12), (signal.SIGINT, 0)],
)
def test_an_interrupted_run_has_left_what_it_announced(stop, after, tmp_path):
    """`after` so many results, at whatever it is doing then."""
    parts = [word for part in ("headline", "kernels") for word in ("--part", part)]
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(tmp_path), *parts]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    log = tmp_path / "gpu.log"
    while not log.exists() or len(announced(log.read_text())) < after:
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, stop)
    code = process.wait(60)
    if stop == signal.SIGKILL:  # nobody is left to end what it had started
        assert code == -signal.SIGKILL
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    else:
        assert code == 130
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert "== interrupted; the results so far are in" in log.read_text()
    found = announced(log.read_text())
    assert len(found) >= after
    assert found <= (stored(tmp_path) if found else set())


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path, dry=True, deadline=time.monotonic() + 60)


def with_codes(monkeypatch, **codes):
    """Parts that run nothing and end with these codes; returns the order in which they ran."""
    ran = []

    def part(name, code):
        return gpu.Part(1, lambda session, limit: ran.append(name) or code)

    parts = {name: part(name, codes.get(name, 0)) for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "show", lambda session, *options: ran.append("table"))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    return ran


def test_what_is_worth_most_runs_first(monkeypatch, tmp_path):
    ran = with_codes(monkeypatch)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert ran[:3] == ["smoke", "headline", "tune"]
    assert ran[-3:] == [*LAST, "table"]


def test_a_part_that_is_cut_off_is_not_red(monkeypatch, tmp_path):
    with_codes(monkeypatch, kernels=gpu.CUT_OFF, tests=gpu.CUT_OFF)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    log = (tmp_path / "gpu.log").read_text()
    assert "== kernels: cut off, not finished" in log
    assert "RED" not in log


def test_a_part_that_fails_is_red_and_the_others_run(monkeypatch, tmp_path):
    ran = with_codes(monkeypatch, smoke=1, kernels=5)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert ran == [*gpu.PARTS, "table"]
    log = (tmp_path / "gpu.log").read_text()
    assert log.count("RED") == 2
    assert "== smoke: RED" in log


def test_a_part_ends_at_its_limit(session):
    code = session.run(*gpu.python("-c", "import time; time.sleep(60)"), limit=0.5)
    assert code == gpu.CUT_OFF
    assert "stopped after" in session.log.read_text()
    session.deadline = time.monotonic() - 1
    assert session.run(*gpu.python("-c", "pass"), limit=10) == gpu.CUT_OFF


def test_one_file_holds_the_results_of_a_run_also_after_midnight(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.DATE, "2026-01-02T23:58Z")
    session = gpu.Session(tmp_path, dry=True, deadline=time.monotonic() + 60)
    monkeypatch.setenv(environment.DATE, "2026-01-03T00:01Z")  # what the clock of a part says
    monkeypatch.setenv(environment.COMMIT, "of-somebody-who-committed-meanwhile")
    gpu.show(session, "--smoke-tests", "green")
    (path,) = tmp_path.glob("cpu*/*.json")
    commit = session.named[environment.COMMIT].replace("+", "-changed")
    assert path.name == f"2026-01-02-{commit}.json"
    assert f"Send this file: {path}" in session.log.read_text()


def test_nothing_that_a_part_started_is_waited_for(session):
    """A process that outlives its parent holds the pipe of the log."""
    leaves_one = "import subprocess; subprocess.Popen(['sleep', '60'])"
    begin = time.monotonic()
    assert session.run(*gpu.python("-c", leaves_one), limit=30) == 0
    assert time.monotonic() - begin < 30


def test_without_a_gpu_only_a_dry_run_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "results")])
    assert "there is no CUDA device; expected one, or --dry" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_headline_numbers_come_within_two_minutes():
    assert [*gpu.PARTS][:2] == ["smoke", "headline"]
    assert gpu.PARTS["smoke"].seconds + gpu.PARTS["headline"].seconds < 120
    assert gpu.TOTAL_SECONDS < 9 * 60
    before_tests = [part.seconds for name, part in gpu.PARTS.items() if name not in LAST]
    assert sum(before_tests) < gpu.TOTAL_SECONDS, "time is left for tests when all take theirs"


def test_the_first_cases_are_two_with_four_contenders():
    cases = test_linear.cases("first")
    assert [(case.M, case.r, passes) for case, passes in cases.items()] == [
        (512, 96, ("graph",)),
        (8192, 96, ("both",)),
    ]
    for case in cases:
        names = [n for n in test_linear.CONTENDERS if test_linear.contends(n, case, "first")]
        assert names == ["frozen", "addmm", "lorasb triton", "lorasb triton, shared input"]


def test_lorafusions_cases_are_among_the_others():
    cases = test_linear.cases("headline")
    square = {(c.groups[0][0].n, c.M, c.r) for c in cases if c.preset.key.startswith("square")}
    assert square == {(n, M, 16) for n in (4096, 5120, 8192) for M in (2048, 4096, 8192)}
    assert next(iter(cases)).M == 512, "what waits on launches is not left to the end"


@pytest.mark.parametrize(
    ("architecture", "nvcc", "said"),
    [
        (None, "/bin/nvcc", "not built, there is no GPU"),
        ("8.6", None, "not built, there is no nvcc; its tests will be skipped"),
    ],
)
def test_without_an_extension_the_run_goes_on(architecture, nvcc, said, monkeypatch, capsys):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(extension, "up_to_date", lambda architecture: False)
    monkeypatch.setattr(extension, "this_architecture", lambda: architecture)
    monkeypatch.setattr(extension, "find_tool", lambda name: nvcc)
    extension.main()
    assert capsys.readouterr().out == f"CUDA extension: {said}\n"


@pytest.mark.parametrize(
    ("architecture", "up_to_date"),
    [
        ("8.6", True),
        ("8.9", False),  # 8.6's code runs there; its own is what is measured
        ("12.0", False),
        ("8.6;9.0", True),
        ("8.6;8.9", False),
        (None, True),
    ],
)
def test_an_extension_for_another_gpu_is_built_anew(
    architecture, up_to_date, monkeypatch, tmp_path
):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "shrink.cu").touch()
    (tmp_path / "lorasb_kernels").mkdir()
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    monkeypatch.setattr(extension, "build_info", lambda: {"architectures": "8.6;9.0+PTX"})
    assert not extension.up_to_date(architecture), "there is none"
    library = tmp_path / "lorasb_kernels" / "_C.so"
    library.touch()
    assert extension.up_to_date(architecture) == up_to_date
    os.utime(library, (0, 0))
    assert not extension.up_to_date(architecture), "older than its sources"


def earlier_version():
    raise AttributeError("undefined symbol: lorasb_versions")


@pytest.mark.parametrize("info", [lambda: {"extension": None, "reason": "no"}, earlier_version])
def test_an_extension_that_does_not_load_is_built_anew(info, monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "shrink.cu").touch()
    (tmp_path / "lorasb_kernels").mkdir()
    (tmp_path / "lorasb_kernels" / "_C.so").touch()
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    monkeypatch.setattr(extension, "build_info", info)
    assert not extension.up_to_date("8.6")
