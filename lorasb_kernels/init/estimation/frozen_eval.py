"""The state in which gradients are estimated, and how it is restored afterwards.

Inside: every module in eval mode (no dropout, running statistics not updated), every
parameter frozen, no key-value cache, no 4-bit weight repacked, gradients enabled, compiled code
run eagerly (a graph compiled before the hooks were added would not call them). Outside, also after
an exception: modes, `requires_grad` flags, buffers, configurations and random number generators are
unchanged. Parameters' `.grad` is never changed.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasb_kernels.quantization import repacking_prevented


@contextmanager
def estimation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` in the state described above for as long as the context is open."""
    with (
        random_state_kept(),
        _buffers_kept(model),
        _frozen_eval(model),
        _cache_disabled(model),
        repacking_prevented(model),
        _compilation_bypassed(),
        torch.inference_mode(False),  # also enables gradients
    ):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module.forward` is `forward` while the context is open."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Each of `blocks` recomputes its activations in backward.

    Replaces the checkpointing of a transformers model, which eval mode switches off.
    """
    with ExitStack() as stack:
        for block in blocks:
            forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
            stack.enter_context(replaced_forward(block, forward))
        yield


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _cache_disabled(model: nn.Module) -> Iterator[None]:
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    configs = [c for c in configs.values() if getattr(c, "use_cache", None)]
    kept = [c.use_cache for c in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in zip(configs, kept, strict=True):
            config.use_cache = use_cache


def _compilation_bypassed() -> AbstractContextManager:
    # If dynamo is not loaded, nothing is compiled; loading it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    tables = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {
        id(buffer): (buffer, buffer.detach().clone())
        for _, table in tables
        for buffer in table.values()
        if buffer is not None
    }
    try:
        yield
    finally:
        for module, table in tables:
            module._buffers.clear()
            module._buffers.update(table)
        with torch.no_grad():
            for buffer, copy in copies.values():
                # Batch normalization writes without raising the version.
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the generators of Python, numpy and torch are in the same state as before."""
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002 - the global generator is the point
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


__all__ = ["checkpointed", "estimation_mode", "random_state_kept", "replaced_forward"]
