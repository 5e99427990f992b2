"""Runs the CUDA extension without a GPU: its host code on CPU tensors, its kernels as PTX.

The extension's own object files are linked with `simulated_runtime.cpp` instead of the CUDA
runtime. Its operators then take CPU tensors. A kernel launch arrives here with the grid, shared
memory and parameters that the launcher chose, and `ptxcheck` executes the kernel's sm_86 PTX on the
tensors' memory. Only tensors whose data pointer the bindings requested are mapped, so that every
access out of bounds is detected.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ptxcheck
from ptxcheck.tensormap import TYPES

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = os.environ.get("LORASB_SIMULATED_ARCHITECTURE", "8.6")
BUILD = ROOT / "build" / f"simulator_{ARCHITECTURE}"
WRAPPED = (
    "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr",
    "aoti_torch_library_init_impl",
    "aoti_torch_get_device_type",
    "aoti_torch_create_device_guard",
)

_spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def objects() -> list[Path]:
    """The extension's object files for sm_86, and their PTX; built once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keep = ("-keep", f"-keep-dir={BUILD}")
        return build.compile_objects(BUILD, ARCHITECTURE, torch_include(), keep)


def torch_include() -> Path:
    return Path(torch.__file__).parent / "include"


def simulated_library() -> Path:
    """Links the object files with the simulated runtime."""
    compiled = objects()
    library = BUILD / "simulated.so"
    source = Path(__file__).with_name("simulated_runtime.cpp")
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [source, *compiled])
        if library.exists() and library.stat().st_mtime > newest:
            return library
        runtime = BUILD / "simulated_runtime.o"
        command = [*("g++", "-c", "-O1", "-std=c++17", "-fPIC"), str(source), "-o", str(runtime)]
        command += ["-isystem", str(torch_include()), "-DUSE_CUDA"]
        command += [f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET}"]
        command += ["-isystem", str(build.toolkit() / "include")]
        subprocess.run(command, check=True)
        wraps = tuple(f"-Wl,--wrap={name}" for name in WRAPPED)
        build.link([*compiled, runtime], library, (*wraps, "-Wl,-z,defs"))
    return library


def kernel_texts() -> dict[str, str]:
    """The PTX of each kernel as a separate module, which is parsed faster than the whole file."""
    texts = {}
    for path in sorted(BUILD.glob("*.ptx")):
        text = path.read_text()
        head, *entries = re.split(r"^(?=(?:\.\w+ )?\.entry )", text, flags=re.MULTILINE)
        shared = "\n".join(re.findall(r"^(?:\.extern|\.file).*", text, re.MULTILINE))
        header = re.sub(r"^(?:\.extern|\.file).*", "", head, flags=re.MULTILINE)
        for entry in entries:
            name = re.search(r"\.entry (\w+)", entry)[1]
            body = re.split(r"^\s*\.section", entry, maxsplit=1, flags=re.MULTILINE)[0]
            texts[name] = f"{header}\n{shared}\n{body}\n"
    return texts


class Launch(NamedTuple):
    """One kernel launch: what the launcher asked for, and ptxcheck's counters."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    stats: object


class Simulator:
    """The loaded extension."""

    def __init__(self):
        library = simulated_library()
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))
        self._load = functools.cache(ptxcheck.load)
        self._texts = kernel_texts()
        self._spans: list[tuple[int, int]] = []
        self._failure: Exception | None = None
        self._record = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int64)(self._on_tensor)
        self._run = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_void_p,
            ctypes.c_size_t,
        )(self._on_launch)
        self._encode = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64),
            *(ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64)),
            *(ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32)),
            *(ctypes.c_uint, ctypes.c_uint),
        )(self._on_tensor_map)
        self.library.simulator_connect(self._record, self._run, self._encode)
        self._options: dict = {}
        self._launches: list[Launch] = []
        self._refuse = False

    @contextlib.contextmanager
    def running(
        self,
        multiprocessors: int = 2,
        refuse: bool = False,
        capability: tuple[int, int] = (8, 6),
        capture: int = 0,
        **options,
    ) -> Iterator[list[Launch]]:
        """Runs operators called inside; yields the list of their launches.

        Args:
            multiprocessors: how many the device reports; decides how work is split.
            capability: of the device; the kernels are those of sm_86, and at 9.0 of sm_90a, too.
            refuse: fail every launch, like a device without resources.
            capture: the number of the CUDA graph that captures the stream; 0 for none.
            options: of ptxcheck's `launch`; race and initialization checks are on.
        """
        self.library.simulator_set_device(multiprocessors, *capability)
        self.library.simulator_set_capture(ctypes.c_ulonglong(capture))
        self._options = {"check_races": True, "check_uninit": True, **options}
        self._spans, self._failure, self._launches = [], None, []
        self._refuse = refuse
        try:
            yield self._launches
        except RuntimeError:
            if self._failure is not None:
                raise self._failure from None
            raise

    def _on_tensor(self, data: int, size: int) -> None:
        if data:
            self._spans.append((data, data + size))

    def _on_launch(self, name: bytes, shape, params: int, shared_bytes: int) -> int:
        try:
            if self._refuse:
                return 1
            kernel, grid, block = name.decode(), tuple(shape[:3]), tuple(shape[3:6])
            module = self._load(self._texts[kernel])
            self._map(module.memory)
            ((_, _, size),) = module.kernels[kernel]
            arguments = [ctypes.string_at(params, size)]
            stats = module.launch(
                kernel, grid, block, arguments, dynamic_smem=shared_bytes, **self._options
            )
            self._launches.append(Launch(kernel, grid, block[0], shared_bytes, stats))
            return 0
        except Exception as failure:
            self._failure = failure
            return 1

    def _on_tensor_map(
        self, out, dtype, rank, data, sizes, strides, box, steps, swizzle, fill
    ) -> int:
        """Encodes a tensor map; 1 if it is none that CUDA would encode."""
        names = {number: name for name, (number, _) in TYPES.items()}
        try:
            tensor_map = ptxcheck.TensorMap(
                data,
                names[dtype],
                sizes[:rank],
                strides[: rank - 1],
                box[:rank],
                steps[:rank],
                swizzle=(0, 32, 64, 128)[swizzle],
                nan_fill=bool(fill),
            )
        except Exception as failure:
            self._failure = failure
            return 1
        ctypes.memmove(out, tensor_map.pack(), 128)
        return 0

    def _map(self, memory) -> None:
        """Maps the recorded spans, merged where they overlap, at their own addresses."""
        memory.release()
        merged: list[list[int]] = []
        for start, end in sorted(set(self._spans)):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        for start, end in merged:
            data = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
            memory.map_at(start, data, f"tensor at {start:#x}")


__all__ = [
    "BUILD",
    "Launch",
    "Simulator",
    "build",
    "objects",
    "simulated_library",
    "torch_include",
]
