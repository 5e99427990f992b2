"""Compiling the extension: no warnings, no spills, and it fits the target."""

import os
import re
import subprocess
import sys
import zipfile

import pytest

from tests.cuda import sass
from tests.cuda import simulator as simulation
from tests.cuda.test_operators import CASES, run

build = simulation.build

# Limits of a multiprocessor of sm_86.
REGISTERS, SHARED_BYTES, RESERVED_BYTES, THREADS = 65536, 100 * 1024, 1024, 1536

KERNELS = 106
HOPPER_KERNELS = 12  # of them, which are compiled for sm_90a alone; see test_hopper_resources.py

# Kernel and its traits -> threads, dynamic shared memory, blocks meant to share a multiprocessor.
# Those of the rank product say so in their name.
OCCUPANCY = {
    r"token_product.*(bfloat16|half)Lb0E": (256, 48 * 1024, 2),
    r"token_product.*(bfloat16|half)Lb1E": (256, 48 * 1024 + 3 * 32 * 4, 1),
    r"token_product.*IfLb0E": (256, 48 * 1024, 1),
    r"token_product.*IfLb1E": (256, 48 * 1024 + 3 * 16 * 4, 1),
    r"expand.*(bfloat16|half)Lb[01]ELi128E": (128, 48 * 1024, 2),
    r"expand.*IfLb[01]ELi128E": (256, 36 * 1024, 1),
    r"expand.*Li32E": (128, 24 * 1024, 2),
    r"sign_matmul": (128, 34 * 1024, 2),
    r"pack_signs": (256, 0, 6),
    r"sum_slices": (128, 0, 12),
    r"probe": (1, 0, 1),
}


def kernels_in(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled and stack bytes by kernel, from `-Xptxas -v`."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    names = ("stack", "stores", "loads", "registers", "static")
    return {
        name: dict(zip(names, (int(number or 0) for number in numbers), strict=True))
        for name, *numbers in re.findall(pattern, log, re.DOTALL)
    }


def compiled_kernels(objects) -> dict[str, dict[str, int]]:
    found = {}
    for path in objects:
        found |= kernels_in(path.with_suffix(".log").read_text())
    return found


def intended(kernel: str) -> tuple[int, int, int]:
    traits = sass.rank_product(kernel)
    if traits is not None:
        return traits.threads, traits.shared_bytes, traits.blocks
    (match,) = [value for pattern, value in OCCUPANCY.items() if re.search(pattern, kernel)]
    return match


def test_no_kernel_spills(toolkit):
    for kernel, resources in compiled_kernels(simulation.objects()).items():
        assert resources["stack"] == resources["stores"] == resources["loads"] == 0, kernel


def test_every_kernel_fits_an_a6000_as_often_as_intended(toolkit):
    kernels = compiled_kernels(simulation.objects())
    assert len(kernels) == KERNELS
    ampere = {name: found for name, found in kernels.items() if "hopper" not in name}
    assert len(ampere) == KERNELS - HOPPER_KERNELS
    for kernel, resources in ampere.items():
        threads, shared_bytes, blocks = intended(kernel)
        registers = -(-resources["registers"] // 8) * 8
        assert registers * threads * blocks <= REGISTERS, kernel
        assert (shared_bytes + resources["static"] + RESERVED_BYTES) * blocks <= SHARED_BYTES
        assert threads * blocks <= THREADS


@pytest.mark.parametrize("operation", CASES)
def test_launches_are_those_of_the_occupancy_table(operation, simulator):
    for launch in run(simulator, operation, *CASES[operation]())[1]:
        assert (launch.threads, launch.shared_bytes) == intended(launch.kernel)[:2]


def test_a_second_build_compiles_nothing(toolkit):
    before = [path.stat().st_mtime_ns for path in simulation.objects()]
    assert [path.stat().st_mtime_ns for path in simulation.objects()] == before


def test_a_failed_compilation_shows_the_compiler_s_message(toolkit, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("int unused() { int x; return 0; }")
    command = build._kernel_command("8.6", [])
    with pytest.raises(RuntimeError, match="declared but never referenced"):
        build._compile(command, source, tmp_path / "wrong.o")
    assert not (tmp_path / "wrong.o").exists()


def test_architectures_are_read_as_torch_reads_them():
    assert build.architecture_flags("8.6;9.0+PTX") == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.architecture_flags("8.0 12.0")[1].endswith("sm_120")
    with pytest.raises(ValueError, match=r"7\.5; the kernels need 8\.0"):
        build.architecture_flags("7.5")
    with pytest.raises(ValueError, match="names 'Ampere'"):
        build.architecture_flags("Ampere")


def test_environment_variables_force_and_skip_the_build(monkeypatch):
    monkeypatch.setattr(build, "obstacle", lambda: "no CUDA toolkit was found")
    monkeypatch.delenv("LORASB_SKIP_CUDA", raising=False)
    monkeypatch.delenv("LORASB_FORCE_CUDA", raising=False)
    assert not build.wanted()
    monkeypatch.setenv("LORASB_FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match="LORASB_FORCE_CUDA=1, but no CUDA toolkit"):
        build.wanted()
    monkeypatch.setattr(build, "obstacle", lambda: None)
    assert build.wanted()
    monkeypatch.setenv("LORASB_SKIP_CUDA", "1")
    assert not build.wanted()


def test_kernels_include_no_torch_header_and_bindings_no_python():
    for path in [*build.SOURCE.rglob("*.cu"), *build.SOURCE.rglob("*.cuh")]:
        assert "torch" not in re.findall(r"#include.*", path.read_text()).__str__(), path.name
    files = ("bindings.cpp", "arguments.h", "arrivals.h")
    bindings = "".join((build.SOURCE / name).read_text() for name in files)
    assert "Python.h" not in bindings
    assert set(re.findall(r"#include <(torch/csrc/\w+)", bindings)) == {
        "torch/csrc/stable",
        "torch/csrc/inductor",
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["8.0", "8.9", "9.0", "10.0"])
def test_it_compiles_for(architecture, toolkit):
    """Without spills, as for sm_86."""
    directory = build.ROOT / "build" / f"sm_{architecture}"
    objects = build.compile_objects(directory, architecture, simulation.torch_include())
    kernels = compiled_kernels(objects)
    assert len(kernels) == KERNELS
    for kernel, resources in kernels.items():
        assert resources["stack"] == resources["stores"] == resources["loads"] == 0, kernel


@pytest.mark.slow
def test_the_operators_as_compiled_for_hopper(toolkit):
    """The kernels that are not Hopper's own, from PTX for sm_90."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/cuda/test_operators.py"]
    environment = os.environ | {"LORASB_SIMULATED_ARCHITECTURE": "9.0"}
    subprocess.run(command, cwd=build.ROOT, env=environment, check=True)


@pytest.mark.slow
def test_the_wheel_carries_the_extension_for_any_python(toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(build.ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "lorasb_kernels/_C.so" in archive.namelist()
        archive.extract("lorasb_kernels/_C.so", tmp_path)
    code = f"import torch; torch.ops.load_library({str(tmp_path / 'lorasb_kernels/_C.so')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
