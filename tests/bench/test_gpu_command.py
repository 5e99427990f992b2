"""`make gpu DRY=1`: the whole path without a GPU, so that it works at the first run on one."""

import time

import pytest

from bench import gpu
from lorasb_kernels.profiling.results import read_all


def test_dry_run(tmp_path, capfd):
    code = gpu.main(["--dry", "--out", str(tmp_path)])
    log = (tmp_path / "gpu.log").read_text()
    assert code == 0, log
    for part in gpu.LIMITS:
        assert f"== {part}: green" in log
    assert "needs a CUDA device" in log
    (found,) = read_all(tmp_path)
    assert found.environment.gpu.startswith("cpu")
    ops = {row.op for row in found.rows}
    assert {"ceiling", "kernel.shrink", "block.both", "init.svd", "init.model"} <= ops
    assert {"train.step", "optimizer.step"} <= ops
    times = found.select(op="block.both", quantity="time", quantile="p50")
    assert {"frozen", "published", "peft", "lorasb reference"} <= {row.contender for row in times}


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path, dry=True, deadline=time.monotonic() + 60, sources="now")


def test_benchmarks_wait_for_green_tests(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "run_benchmark", lambda session, part: ran.append(part) or True)
    monkeypatch.setattr(gpu, "run_tests", lambda session: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert not ran
    (tmp_path / "tests-passed").write_text(gpu.sources_digest() + "\n")
    assert gpu.main(["--out", str(tmp_path), "--part", "linear", "--part", "train"]) == 0
    assert ran == ["linear", "train"]
    (tmp_path / "tests-passed").write_text("other sources\n")
    assert gpu.main(["--out", str(tmp_path), "--part", "linear"]) == 1
    assert ran == ["linear", "train"]


def test_red_tests_leave_no_record(session, monkeypatch):
    session.record.write_text(session.sources)
    monkeypatch.setattr(gpu.Session, "run", lambda self, *command, limit, **environment: 1)
    assert not gpu.run_tests(session)
    assert not session.record.exists()
    assert not gpu.tests_passed(session)


def test_a_part_ends_at_its_limit(session):
    code = session.run(*gpu.python("-c", "import time; time.sleep(60)"), limit=0.5)
    assert code == 124
    assert "stopped after" in session.log.read_text()
    session.deadline = time.monotonic() - 1
    assert session.run(*gpu.python("-c", "pass"), limit=10) == 124


def test_limits_fit_in_nine_minutes():
    assert gpu.TOTAL_SECONDS < 9 * 60
    assert sum(gpu.LIMITS.values()) <= 600  # the deadline cuts what the limits leave
