"""Importing is cheap and needs only the core install."""

import os
import subprocess
import sys

import pytest

# Builds of torch for CUDA import triton themselves; those modules are removed here.
BLOCK = """
import sys, torch
for name in [name for name in sys.modules if name.split(".")[0] in ("triton", *{blocked!r})]:
    del sys.modules[name]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
"""


def run(code: str, blocked: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    completed = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


REFERENCE_STEP = """
import torch
from lorasb_kernels.functional import lorasb_linear
R = torch.randn(2, 2, requires_grad=True)
x = torch.randn(3, 8)
args = (torch.randn(6, 8), torch.randn(2, 8), R, torch.randn(6, 2))
lorasb_linear(x, *args, dropout=0.5).sum().backward()
print(R.grad.shape)
"""


def test_the_reference_imports_neither_triton_nor_the_extension():
    code = REFERENCE_STEP + "print('triton' in sys.modules, torch.ops.loaded_libraries)"
    assert run(code).splitlines() == ["torch.Size([2, 2])", "False set()"]
    assert run(REFERENCE_STEP, blocked=("triton",)) == "torch.Size([2, 2])"


def test_the_package_needs_only_the_core_install():
    code = """
import lorasb_kernels
for name in lorasb_kernels.__all__:
    getattr(lorasb_kernels, name)
"""
    optional = ("transformers", "accelerate", "peft", "rich", "yaml", "matplotlib")
    run(code, blocked=("triton", "bitsandbytes", "torchao", *optional))


def test_every_public_name_is_there():
    import lorasb_kernels

    for name in lorasb_kernels.__all__:
        assert getattr(lorasb_kernels, name) is not None
    assert callable(lorasb_kernels.adapt)
    assert callable(lorasb_kernels.describe)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lorasb_kernels.nonsense  # noqa: B018


def test_named_backends_say_why_they_cannot_run():
    code = """
import torch
from lorasb_kernels.functional import lorasb_linear
arguments = (torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(2, 2))
for backend in ("triton", "cuda"):
    try:
        lorasb_linear(*arguments, torch.randn(6, 2), backend=backend)
    except RuntimeError as error:
        print(error)
"""
    triton, cuda = run(code).splitlines()
    assert triton == "backend='triton' cannot run: the tensors are on cpu, not on a CUDA device"
    assert cuda.startswith("backend='cuda' cannot run: ")
    blocked, _ = run(code, blocked=("triton",)).splitlines()
    assert blocked == "backend='triton' cannot run: triton cannot be imported (blocked: triton)"


def test_import_is_quick():
    code = """
import time, torch
start = time.perf_counter()
import lorasb_kernels
print(time.perf_counter() - start)
"""
    best = min(float(run(code)) for _ in range(3))
    assert best < 0.3
