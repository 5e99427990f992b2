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


def environment(device: torch.device) -> Environment:
    """The environment of `device` now."""
    on_gpu = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if on_gpu else f"cpu: {_cpu_model()}",
        driver=_driver() if on_gpu else "",
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    )


def commit() -> str:
    """The commit of the checkout, or `LORASB_COMMIT` if there is no repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not head:
        return os.environ.get("LORASB_COMMIT", "unknown")
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


__all__ = ["commit", "environment"]
