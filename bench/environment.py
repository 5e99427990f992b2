"""Where a measurement was taken: device, driver, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from lorasb_kernels.profiling.results import Environment

ROOT = Path(__file__).resolve().parents[1]


# Set by `make gpu` for its processes: their results have one date and commit, those of its start,
# and with them one file.
DATE, COMMIT = "LORASB_DATE", "LORASB_COMMIT"


def environment(device: torch.device) -> Environment:
    """The environment of `device`: of the run that this process is part of, or now."""
    on_gpu = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if on_gpu else f"cpu: {_cpu_model()}",
        driver=_driver() if on_gpu else "",
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
        date=date(),
    )


def date() -> str:
    """`LORASB_DATE`, or the time now: UTC, ISO 8601 to the minute."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    return os.environ.get(DATE, now)


def commit() -> str:
    """`LORASB_COMMIT`, or the commit of the checkout."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


__all__ = ["COMMIT", "DATE", "commit", "date", "environment"]
