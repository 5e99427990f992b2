"""Builds the CUDA extension for this machine's GPU, before the clock of `make gpu` starts.

    python -m bench.extension

Does nothing if the extension is newer than its sources and has code for the GPU, and without
`nvcc`. Never fails: the benchmarks of the other backends do not need it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lorasb_kernels.ops.extension import build_info

ROOT = Path(__file__).resolve().parents[1]


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or where toolkits are installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def up_to_date(architectures: str | None) -> bool:
    """Whether the extension exists, is newer than its sources and was built for architectures.

    Args:
        architectures: in the form of TORCH_CUDA_ARCH_LIST; None if there is no GPU.
    """
    library = ROOT / "lorasb_kernels" / "_C.so"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("**/*.*"))
    if not library.exists() or library.stat().st_mtime < newest:
        return False
    if architectures is None:
        return True
    try:
        built = build_info().get("architectures") or ""
    except AttributeError:  # of an earlier version of the library
        return False
    return covers(built, architectures)


def covers(built: str, wanted: str) -> bool:
    """Whether there is code of its own for every architecture, not of an earlier one."""
    number = re.compile(r"\d+\.\d+")
    return set(number.findall(wanted)) <= set(number.findall(built))


def this_architecture() -> str | None:
    """The compute capability of the first GPU, as TORCH_CUDA_ARCH_LIST takes it."""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] if found else None


def main() -> None:
    """Builds it, or says why not."""
    architecture = os.environ.get("TORCH_CUDA_ARCH_LIST") or this_architecture()
    if up_to_date(architecture):
        print("CUDA extension: up to date")
    elif architecture is None:
        print("CUDA extension: not built, there is no GPU")
    elif find_tool("nvcc") is None:
        print("CUDA extension: not built, there is no nvcc; its tests will be skipped")
    else:
        variables = {"LORASB_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        code = subprocess.call(command, cwd=ROOT, env={**os.environ, **variables})
        print("CUDA extension: built" if code == 0 else "CUDA extension: FAILED to build")


if __name__ == "__main__":
    main()
