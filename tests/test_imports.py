"""Importing is cheap and needs only the core install."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorasb_kernels

OPTIONAL = (
    *("transformers", "accelerate", "peft", "rich", "yaml", "matplotlib"),
    *("bitsandbytes", "torchao", "huggingface_hub"),
)

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
    run(code, blocked=("triton", *OPTIONAL))


def test_every_public_name_is_there():
    for name in lorasb_kernels.__all__:
        assert getattr(lorasb_kernels, name) is not None
    assert callable(lorasb_kernels.adapt)
    assert callable(lorasb_kernels.describe)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lorasb_kernels.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["lorasb_kernels", "lorasb_kernels.init"])
def test_type_checkers_see_every_public_name(package):
    """Names are imported at first use; for a type checker they are spelled out a second time."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    (spelled_out,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {alias.asname: node.module for node in spelled_out.body for alias in node.names}
    lazily = {**dict.fromkeys(getattr(module, "_MODULES", ()), package), **module._HOME}
    assert found == lazily
    assert (Path(lorasb_kernels.__file__).parent / "py.typed").exists()


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


def test_importing_the_package_imports_nothing_else():
    """Not even torch: public names are imported at first use."""
    code = """
import sys
before = set(sys.modules)
import lorasb_kernels
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(added - sys.stdlib_module_names))
"""
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout.split() == ["lorasb_kernels"]


def test_the_public_names_import_no_optional_package():
    code = """
import lorasb_kernels
for name in lorasb_kernels.__all__:
    getattr(lorasb_kernels, name)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    imported = set(run(code).split())
    assert "safetensors" in imported
    assert imported.isdisjoint({"triton", *OPTIONAL})
