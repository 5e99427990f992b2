"""The built library: it loads without a GPU, describes itself and refuses what it cannot do."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

import lorasb_kernels
from lorasb_kernels.ops import extension
from lorasb_kernels.ops.dispatch import resolve_backend
from tests.cuda import simulator as simulation
from tests.cuda.test_operators import BF16, CASES, CPU, SCALING, expand_operands, shrink_operands
from tests.ops.operands import as_tuple


def _cuda_version() -> int:
    header = simulation.build.toolkit() / "include" / "cuda_runtime_api.h"
    return int(re.search(r"#define CUDART_VERSION\s+(\d+)", header.read_text())[1])


CUDA_VERSION = _cuda_version() if simulation.build.toolkit() else 0


@pytest.fixture(scope="session")
def library(toolkit):
    """The extension itself, as `make ext` links it, for sm_86."""
    path = simulation.BUILD / "_C.so"
    simulation.build.link(simulation.objects(), path, simulation.build.static_runtime())
    return path


def python(library, code: str) -> str:
    """Runs code in a separate process, with `library` instead of the extension."""
    prelude = (
        "import torch\nfrom pathlib import Path\nfrom lorasb_kernels.ops import extension\n"
        f"extension._LIBRARY = Path({str(library)!r})\n"
    )
    command = [sys.executable, "-c", prelude + code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_loads_without_a_gpu_and_tells_what_it_is(library):
    info = json.loads(python(library, "import json; print(json.dumps(extension.build_info()))"))
    assert info["architectures"] == "8.6"
    assert "release" in info["nvcc"]
    assert info["torch_target"] == "0x020a000000000000"
    assert info["extension"] == str(library)


def test_triton_s_route_to_it_is_there_once_it_is_loaded(library):
    code = """
import lorasb_kernels.ops.expand  # defines the operator
from lorasb_kernels.ops.triton.expand_dual import dual_is_loaded
before = dual_is_loaded()
extension.obstacle()
print(before, dual_is_loaded())
"""
    assert python(library, code).split() == ["False", "True"]


def test_cpu_tensors_are_refused(library):
    code = """
from lorasb_kernels.functional import lorasb_linear
try:
    lorasb_linear(*(torch.ones(2, 2) for _ in range(5)), backend="cuda")
except RuntimeError as error:
    print(error)
from lorasb_kernels.ops.shrink import shrink
try:
    shrink(*(torch.ones(2, 2) for _ in range(3)), 1.0, 0.0, None, "cuda")
except NotImplementedError as error:
    print(error)
"""
    out = python(library, code)
    assert "backend='cuda' cannot run: the tensors are on cpu, not on a CUDA device" in out
    assert "'lorasb::shrink_cuda' with arguments from the 'CPU' backend" in out


def test_it_links_no_python_and_no_cuda_library(library):
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    needed = [line for line in listing.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not any("python" in line or "cuda" in line for line in needed)


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(extension, "obstacle", extension.obstacle.__wrapped__)
    info = lorasb_kernels.build_info()
    assert info["extension"] is None
    assert "not built" in info["reason"]
    with pytest.raises(RuntimeError, match="extension is not built"):
        resolve_backend("cuda", CPU, torch.float32)


def test_a_broken_library_is_explained(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_LIBRARY", broken)
    monkeypatch.setattr(extension, "obstacle", extension.obstacle.__wrapped__)
    with pytest.raises(RuntimeError, match=r"failed to load: .*broken\.so"):
        resolve_backend("cuda", CPU, torch.float32)


def test_an_old_driver_is_named_with_the_one_that_is_needed(loaded_simulator):
    library = loaded_simulator.library
    assert extension.driver_obstacle(library) is None
    try:
        library.simulator_set_driver(12040, 0)
        reason = extension.driver_obstacle(library)
        library.simulator_set_driver(0, 0)  # no driver: then there is no CUDA device to refuse
        assert extension.driver_obstacle(library) is None
    finally:
        library.simulator_set_driver(CUDA_VERSION, 0)
    major, minor = CUDA_VERSION // 1000, CUDA_VERSION % 1000 // 10
    assert f"built with CUDA {major}.{minor} and needs a driver of CUDA {major}" in reason
    assert "R580 or newer" in reason or major != 13
    assert reason.endswith("the installed one supports CUDA 12.4")


def test_an_architecture_without_kernels_is_named_with_those_that_have_them(loaded_simulator):
    library = loaded_simulator.library
    assert extension.kernel_obstacle(library, 0) is None
    try:
        library.simulator_set_driver(CUDA_VERSION, 209)  # cudaErrorNoKernelImageForDevice
        reason = extension.kernel_obstacle(library, 3)
    finally:
        library.simulator_set_driver(CUDA_VERSION, 0)
    assert reason == (
        "the CUDA extension cannot run on cuda:3 (no kernel image is available); it was built for "
        "compute capability 8.6"
    )


def accumulate_arguments():
    grad_output, x, row_weight = CASES["sign_gradient"]()
    return torch.zeros(grad_output.shape[1], x.shape[1]), grad_output, x, row_weight


EVERY_OPERATOR = CASES | {
    "pack_signs": lambda: (torch.randn(33, 70),),
    "sign_accumulate": accumulate_arguments,
}


@pytest.mark.parametrize("operation", EVERY_OPERATOR)
def test_opcheck(operation, simulator):
    arguments = EVERY_OPERATOR[operation]()
    with simulator.running(check_races=False, check_uninit=False):
        torch.library.opcheck(
            getattr(torch.ops.lorasb, f"{operation}_cuda").default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("operation", CASES)
def test_shapes_are_known_without_library_or_gpu(operation):
    arguments = CASES[operation]()
    meta = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments)
    outputs = getattr(torch.ops.lorasb, f"{operation}_cuda")(*meta)
    expected = getattr(torch.ops.lorasb, f"{operation}_reference")(*arguments)
    for out, ref in zip(as_tuple(outputs), as_tuple(expected), strict=True):
        assert (out.shape, out.dtype, out.device.type) == (ref.shape, ref.dtype, "meta")


x, A, R = shrink_operands(4, 24, 3, BF16)
X, W, P, F = expand_operands(4, 5, 24, 3, BF16)
PLANE = torch.zeros(5, 1, dtype=torch.int32)
NEEDS_SEED = "seed is None; expected int64"


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        ("shrink", (x.double(), A, R, 1.0, 0.0, None), "x has dtype Double; expected Half, BF"),
        ("shrink", (x[0], A, R, 1.0, 0.0, None), r"x has shape \[24\]; expected two dimensions"),
        ("shrink", (x, A.half(), R, 1.0, 0.0, None), "lora_A has dtype Half; expected BFloat16"),
        ("shrink", (x, A[:, 1:], R, 1.0, 0.0, None), r"lora_A has shape \[3, 23\]; expected \[3,"),
        ("shrink", (x, A, R.half(), 1.0, 0.0, None), "lora_R has dtype Half; expected Float"),
        ("shrink", (x, A, R[:2], 1.0, 0.0, None), r"lora_R has shape \[2, 3\]; expected \[2, 2\]"),
        ("shrink", (x, A, torch.ones(600, 600), 1.0, 0.0, None), "with 1 <= r <= 512"),
        ("shrink", (x, A, R, 1.0, 0.5, None), NEEDS_SEED),
        ("shrink", (x, A, R, 1.0, 1.5, None), "dropout is 1.5; expected 0 <= dropout < 1"),
        ("core_backward", (x, x, A.T, R, 1.0), r"h has shape \[4, 24\]; expected \[4, 3\]"),
        ("expand", (X, W, P[:2], F, None, 0.0, None), r"p has shape \[2, 3\]; expected \[4, 3\]"),
        ("expand", (X, W, P, F, P[0], 0.0, None), r"bias has shape \[3\]; expected \[5\]"),
        ("sign_gradient", (X[:2], X, None), r"grad_output has shape \[2, 24\]; expected \[4, 24\]"),
        ("sign_gradient", (X, X, torch.ones(3)), r"row_weight has shape \[3\]; expected \[4\]"),
        ("sign_accumulate", (torch.ones(2, 2), X, X, None), r"acc has shape \[2, 2\]; expected"),
        ("sign_matmul", (PLANE, PLANE, torch.ones(9, 2), 8, False), r"dense has shape \[9, 2\]"),
        ("sign_matmul", (PLANE, PLANE[:, :0], torch.ones(8, 2), 8, False), "negative has shape"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_launched(
    operation, arguments, message, simulator
):
    with (
        simulator.running() as launches,
        pytest.raises(RuntimeError, match=f"{operation}: {message}|{message}"),
    ):
        getattr(torch.ops.lorasb, f"{operation}_cuda")(*arguments)
    assert launches == []


def test_a_failed_launch_names_kernel_grid_and_shapes(simulator):
    message = (
        r"CUDA kernel shrink failed to launch: launch failure "
        r"\(grid 1×1×1, \d+ bytes of shared memory, operands \[4, 24\] and \[3, 24\]\)"
    )
    with simulator.running(refuse=True), pytest.raises(RuntimeError, match=message):
        torch.ops.lorasb.shrink_cuda(x, A, R, SCALING, 0.0, None)
