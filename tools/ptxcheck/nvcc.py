"""CUDA C++ -> PTX with nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import CompileError


def find_nvcc() -> str | None:
    """NVCC, the one on PATH, or that of CUDA_HOME or of the usual place; None if nowhere."""
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    here = (str(place / "bin" / "nvcc") for place in places if (place / "bin" / "nvcc").exists())
    return found or next(here, None)


def nvcc_ptx(source: str | os.PathLike, arch: int | str = 86, flags: Sequence[str] = ()) -> str:
    """PTX text of a .cu file, or of CUDA C++ source text (which has line breaks).

    Raises:
        CompileError: nvcc was not found, or failed; with what it wrote.
        FileNotFoundError: there is no such file.
    """
    is_text = isinstance(source, str) and "\n" in source
    if not is_text and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source} (source text has line breaks)")
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc was not found on PATH, in CUDA_HOME or by NVCC")
    with tempfile.TemporaryDirectory() as folder:
        path, ptx = Path(folder, "kernel.cu") if is_text else Path(source), Path(folder, "out.ptx")
        if is_text:
            path.write_text(source)
        command = [nvcc, "-ptx", "-O3", "-lineinfo", "-std=c++17", f"-arch=sm_{arch}"]
        completed = subprocess.run(
            [*command, *flags, str(path), "-o", str(ptx)],
            capture_output=True,
            text=True,
            check=False,
        )
        if completed.returncode:
            raise CompileError(f"nvcc failed:\n{completed.stderr[-6000:]}")
        return ptx.read_text()
