"""Builds the CUDA extension `lorasb_kernels/_C.so`.

nvcc compiles the kernels, which include no torch header; g++ compiles `bindings.cpp` on
the LibTorch stable ABI. No GPU is needed. A file is compiled again only when it, a header
or its command has changed.

    TORCH_CUDA_ARCH_LIST   architectures, as torch reads it; default 8.0;8.6;8.9;9.0+PTX.
                           The kernels in `hopper/` are for 9.0a, whatever it names
    LORASB_SKIP_CUDA=1     `pip install` leaves the extension out
    LORASB_FORCE_CUDA=1    `pip install` fails if the extension cannot be built
    CUDA_HOME, MAX_JOBS    toolkit; files compiled at a time

Run as a script (`make ext`) it builds in place.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parent
LIBRARY = ROOT / "lorasb_kernels" / "_C.so"
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
HOPPER_ARCHITECTURES = "9.0a"
TORCH_TARGET = "0x020a000000000000"  # 2.10, the oldest torch that the library loads under
WARNINGS = ["-Wall", "-Wextra"]


def toolkit() -> Path | None:
    """The CUDA toolkit, from CUDA_HOME or the nvcc on the PATH."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent]
    homes.append("/usr/local/cuda")
    for home in homes:
        files = ("bin/nvcc", "include/cuda_runtime_api.h")
        if home and all((Path(home) / file).exists() for file in files):
            return Path(home)
    return None


def obstacle() -> str | None:
    """Why the extension cannot be built here; None when it can."""
    if toolkit() is None:
        return "no CUDA toolkit was found (set CUDA_HOME or put nvcc on the PATH)"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    return None


def wanted() -> bool:
    """Whether this installation builds the extension.

    Raises:
        RuntimeError: LORASB_FORCE_CUDA=1 and it cannot be built.
    """
    if os.environ.get("LORASB_SKIP_CUDA", "0") == "1":
        return False
    reason = obstacle()
    if reason and os.environ.get("LORASB_FORCE_CUDA", "0") == "1":
        raise RuntimeError(f"LORASB_FORCE_CUDA=1, but {reason}")
    return reason is None


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's -gencode flags for a list such as `8.0;8.6;9.0+PTX`."""
    flags = []
    for name in architectures.replace(",", ";").replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", name)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST names {name!r}; expected numbers such as 8.6 or 9.0+PTX"
            )
        number = match[1] + match[2] + match[3]
        if int(match[1]) < 8:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST names {name}; the kernels need 8.0 or newer")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _first_line_with(command: list[str], word: str) -> str:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line.strip() for line in lines if word in line), lines[0])


def _compression() -> list[str]:
    """Flags that make the kernels a tenth of their size, most of which is line numbers.

    Drivers of CUDA 12 may not read the result. The runtime of CUDA 13 needs a newer one anyway.
    """
    nvcc = str(toolkit() / "bin" / "nvcc")
    release = re.search(r"release (\d+)", _first_line_with([nvcc, "--version"], "release"))
    return ["--compress-mode=size"] if release and int(release[1]) >= 13 else []


def _kernel_command(architectures: str, extra: list[str]) -> list[str]:
    return [
        str(toolkit() / "bin" / "nvcc"),
        *("-c", "-O3", "-std=c++17", "-lineinfo", "-Xptxas=-v", "--Werror=all-warnings"),
        *_compression(),
        *(f"-Xcompiler=-fPIC,-fvisibility=hidden,{','.join(WARNINGS)}",),
        *architecture_flags(architectures),
        *extra,
    ]


def _bindings_command(architectures: str, torch_include: Path) -> list[str]:
    compiler = os.environ.get("CXX", "g++")
    info = {
        "architectures": architectures,
        "nvcc": _first_line_with([str(toolkit() / "bin" / "nvcc"), "--version"], "release"),
        "compiler": _first_line_with([compiler, "--version"], ""),
        "torch_target": TORCH_TARGET,
    }
    return [
        compiler,
        *("-c", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", *WARNINGS, "-Werror"),
        *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA"),
        f"-DLORASB_BUILD_INFO={json.dumps(json.dumps(info))}",
        *("-isystem", str(torch_include), "-isystem", str(toolkit() / "include")),
    ]


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Compiles unless `target` is newer than its inputs and came from the same command.

    The compiler's messages, which include a kernel's registers, are kept in `<target>.log`.
    """
    record = target.with_suffix(".log")
    headers = [*SOURCE.rglob("*.cuh"), *SOURCE.rglob("*.h")]
    newest = max(path.stat().st_mtime for path in [source, *headers])
    title = " ".join([*command, str(source)]) + "\n"
    if target.exists() and target.stat().st_mtime > newest and record.exists():
        if record.read_text().startswith(title):
            return
        target.unlink()
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True)
    messages = (result.stdout + result.stderr).decode()
    if result.returncode:
        raise RuntimeError(f"{title}{messages}")
    record.write_text(title + messages)


def compile_objects(
    directory: Path, architectures: str, torch_include: Path, extra: tuple[str, ...] = ()
) -> list[Path]:
    """Compiles every file of `csrc/` into `directory`; returns the object files.

    Args:
        directory: where objects and logs go.
        architectures: as in TORCH_CUDA_ARCH_LIST.
        torch_include: torch's include directory; its version may differ from the installed.
        extra: further flags for nvcc.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kernels = _kernel_command(architectures, list(extra))
    hopper = _kernel_command(HOPPER_ARCHITECTURES, list(extra))
    bindings = _bindings_command(architectures, torch_include)
    jobs = [(bindings, SOURCE / "bindings.cpp")]
    jobs += [(hopper, source) for source in sorted(SOURCE.glob("hopper/*.cu"))]
    jobs += [(kernels, source) for source in sorted(SOURCE.glob("*.cu"))]
    objects = [directory / f"{source.stem}.o" for _, source in jobs]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(lambda job, target: _compile(*job, target), jobs, objects))
    return objects


def link(objects: list[Path], library: Path, extra: tuple[str, ...] = ()) -> None:
    """Links `library`, written to a temporary file in the same folder and renamed.

    Only libtorch.so is linked, whichever torch is installed at run time: its CUDA build depends on
    libtorch_cuda.so, its CPU build does not.
    """
    import torch

    partial = library.with_suffix(".partial")
    command = [os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(partial)]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    command += ["-ltorch_cpu", "-Wl,--as-needed", *extra]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    os.replace(partial, library)


def static_runtime() -> tuple[str, ...]:
    """Link flags of the CUDA runtime, which is linked statically."""
    home = toolkit()
    return (f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart_static", "-lrt", "-ldl")


def build(library: Path = LIBRARY) -> None:
    """Compiles what has changed and links `library`."""
    import torch

    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    include = Path(torch.__file__).parent / "include"
    objects = compile_objects(ROOT / "build" / "csrc", architectures, include)
    library.parent.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in objects)
    if not library.exists() or library.stat().st_mtime < newest:
        link(objects, library, static_runtime())


if __name__ == "__main__":
    reason = obstacle()
    if reason:
        raise SystemExit(f"the CUDA extension cannot be built: {reason}")
    build()
