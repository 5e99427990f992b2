"""The same inputs give the same bits: in another process, and over a whole training run.

Repeated calls are part of every test of `test_numerics`; CUDA graphs are in `tests/gpu`.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorasb_kernels.functional import lorasb_group, sign_gradient
from lorasb_kernels.train.run import finetune
from tests.ops.operands import normal, same_bits
from tests.train.conftest import sums, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def digest() -> str:
    """SHA-256 of the outputs and gradients of a group of layers and of packed signs."""
    sha, cpu = hashlib.sha256(), torch.device("cpu")
    for backend, dtype in (("reference", torch.bfloat16), ("triton", torch.float16)):
        x = normal(40, 70, dtype=dtype, device=cpu).requires_grad_()
        shapes = {"W": (33, 70), "A": (24, 70), "R": (24, 24), "B": (33, 24)}
        layers = {
            name: [
                normal(*shape, dtype=torch.float32 if name == "R" else dtype, device=cpu, seed=i)
                for i in range(2)
            ]
            for name, shape in shapes.items()
        }
        for core in layers["R"]:
            core.requires_grad_()
        torch.manual_seed(0)
        ys = lorasb_group(x, *layers.values(), (None, None), 0.5, 0.2, backend=backend)
        gradients = torch.autograd.grad(ys, (x, *layers["R"]), [y.detach() for y in ys])
        planes = sign_gradient(ys[0].detach(), x.detach(), backend=backend)
        for tensor in (*ys, *gradients, *planes):
            sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_another_process_gives_the_same_bits():
    code = "from tests.trust.test_repeatability import digest; print(digest())"
    threads = str(torch.get_num_threads())
    completed = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads({threads}); {code}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.split()[-1] == digest() == digest()


def test_a_training_run_repeats_bit_for_bit(llama, tmp_path):
    tensors, losses = [], []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        config = tiny_config(llama, tmp_path / name, dropout=0.1, max_steps=4, seed=seed)
        losses.append(finetune(config, sums(40))[2].losses)
        files = ("adapter.safetensors", "subspace.safetensors")
        saved = [load_file(tmp_path / name / "adapter" / file) for file in files]
        tensors.append(saved[0] | saved[1])
    assert losses[0] == losses[1]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(same_bits(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert losses[0] != losses[2], "another seed is another run"
