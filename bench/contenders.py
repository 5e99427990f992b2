"""Every way to compute an adapted layer that is timed, each once.

A contender builds modules from the operands of layers that read one input. `trains` says which
function it computes and which gradients it gives, so that its results can be checked:

    "nothing"   x Wᵀ + bias
    "core"      x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, gradient of R     (LoRA-SB)
    "factors"   x Wᵀ + s·x Aᵀ Bᵀ + bias, gradients of A and B   (LoRA)

Liger has kernels for other layers, but none for a linear layer with an adapter.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels.nn.linear import LoRALinear
from lorasb_kernels.ops.dispatch import obstacle as backend_obstacle
from lorasb_kernels.profiling.workload import Build, Operands, adapted_layers, frozen_layer


@dataclass(frozen=True)
class Contender:
    """One way to compute adapted layers.

    Args:
        name: as in the results.
        summary: what it is, in a line.
        build: makes the modules.
        trains: `"nothing"`, `"core"` or `"factors"`.
        obstacle: why it cannot run on a device in a dtype; None when it can.
        way: key of `costs.WAYS` whose launches are its lower bound; None if none are counted.
        compiles: takes long to start.
    """

    name: str
    summary: str
    build: Build
    trains: str
    obstacle: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    way: str | None = None
    compiles: bool = False


class Published(nn.Module):
    """LoRA-SB as published, on top of peft's forward: R in the dtype of the model, the input
    cast to the adapter's dtype, a scaling pass over the output, an add, a cast back."""

    def __init__(self, operands: Operands):
        super().__init__()
        self.operands = operands
        core = operands.lora_R.detach().to(operands.weight.dtype)
        self.lora_R = nn.Parameter(core.clone())

    def forward(self, x):
        weight, bias = self.operands.weight, self.operands.bias
        result = F.linear(x, weight, bias)
        dtype = result.dtype
        low = x.to(self.operands.lora_A.dtype)
        for factor in (self.operands.lora_A, self.lora_R, self.operands.lora_B):
            low = F.linear(low, factor)
        result = result + low * self.operands.scaling
        return result.to(dtype)


class _InPlaceAddmm(torch.autograd.Function):
    """Five GEMMs forward and five backward, each sum inside a GEMM, 16-bit core."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_R, lora_B, scaling):
        h = x @ lora_A.T
        p = h @ lora_R.T
        y = F.linear(x, weight, bias).addmm_(p, lora_B.T, alpha=scaling)
        ctx.save_for_backward(h, weight, lora_A, lora_R, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, weight, lora_A, lora_R, lora_B = ctx.saved_tensors
        g = dy @ lora_B
        dR = (g.T @ h).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(g @ lora_R, lora_A, alpha=ctx.scaling)
        return dx, None, None, None, dR, None, None


class InPlaceAddmm(nn.Module):
    """The best that plain cuBLAS calls can do, as in Unsloth."""

    def __init__(self, operands: Operands):
        super().__init__()
        self.operands = operands
        core = operands.lora_R.detach().to(operands.weight.dtype)
        self.lora_R = nn.Parameter(core.clone())

    def forward(self, x):
        o = self.operands
        return _InPlaceAddmm.apply(x, o.weight, o.bias, o.lora_A, self.lora_R, o.lora_B, o.scaling)


class Unsloth(nn.Module):
    """LoRA by Unsloth's autograd function."""

    def __init__(self, operands: Operands):
        super().__init__()
        from unsloth.kernels.fast_lora import LoRA_W

        self.function = LoRA_W
        self.operands = operands
        self.lora_A = nn.Parameter(operands.lora_A.detach().clone())
        self.lora_B = nn.Parameter(operands.lora_B.detach().clone())

    def forward(self, x):
        o = self.operands
        y = self.function.apply(x[None], o.weight, None, self.lora_A, self.lora_B, o.scaling)[0]
        return y if o.bias is None else y + o.bias


class Autocast(nn.Module):
    """`module` under autocast to `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype):
            return self.module(x)


def _peft(operands: Operands, fp32_adapters: bool, autocast: bool) -> nn.Module:
    """LoRA by the peft library; it keeps adapters in fp32 by default."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    r = operands.lora_A.shape[0]
    config = LoraConfig(r=r, lora_alpha=operands.scaling * r, init_lora_weights=False)
    base = frozen_layer(operands)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=operands.scaling * r)
    layer.base_layer.requires_grad_(False)
    dtype = torch.float32 if fp32_adapters else operands.weight.dtype
    for module, value in (
        (layer.lora_A["default"], operands.lora_A),
        (layer.lora_B["default"], operands.lora_B),
    ):
        module.weight = nn.Parameter(value.detach().to(dtype, copy=True))
    return Autocast(layer, operands.weight.dtype) if autocast else layer


def _compiled(operands: Operands) -> nn.Module:
    from torch._functorch import config

    config.donated_buffer = False  # timing only backward runs it repeatedly over one graph
    return torch.compile(Published(operands), dynamic=False)


def _each(build_one: Callable[[Operands], nn.Module]) -> Build:
    return lambda group: [build_one(operands) for operands in group]


def _needs(package: str, only_gpu: bool = False):
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if only_gpu and device.type != "cuda":
            return f"{package} needs a CUDA device"
        return None

    return obstacle


def _only_16_bits(obstacle):
    def wrapped(device: torch.device, dtype: torch.dtype) -> str | None:
        return obstacle(device, dtype) or (
            "adapters in fp32 differ from the model in 16 bits only" if dtype.itemsize > 2 else None
        )

    return wrapped


def _backend(name: str, shared: bool = False) -> Contender:
    words = "siblings share a pass over their input" if shared else "each layer alone"
    return Contender(
        name=f"lorasb {name}" + (", shared input" if shared else ""),
        summary=f"this library, backend {name}, {words}",
        build=partial(adapted_layers, backend=name, shared=shared),
        trains="core",
        obstacle=lambda device, dtype: backend_obstacle(name, device, dtype),
        way="two_call",
    )


def _lora(name: str, shared: bool) -> Contender:
    words = "siblings share a pass over their input" if shared else "each layer alone"
    return Contender(
        name=f"lorasb {name}, LoRA" + (", shared input" if shared else ""),
        summary=f"LoRA by this library, factors in fp32, backend {name}, {words}",
        build=partial(adapted_layers, backend=name, shared=shared, kind=LoRALinear),
        trains="factors",
        obstacle=lambda device, dtype: backend_obstacle(name, device, dtype),
    )


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "frozen", "the frozen layer: the bound", _each(frozen_layer), "nothing", way="frozen"
        ),
        Contender(
            *("published", "eager LoRA-SB as published", _each(Published), "core"),
            way="published",
        ),
        Contender(
            *("published, compiled", "torch.compile of eager LoRA-SB", _each(_compiled), "core"),
            compiles=True,
        ),
        Contender("addmm", "LoRA-SB by in-place addmm_", _each(InPlaceAddmm), "core"),
        Contender(
            name="peft",
            summary="LoRA of the peft library, adapters in the model's dtype",
            build=_each(partial(_peft, fp32_adapters=False, autocast=False)),
            trains="factors",
            obstacle=_needs("peft"),
        ),
        Contender(
            name="peft fp32",
            summary="LoRA of the peft library, adapters in fp32, its default",
            build=_each(partial(_peft, fp32_adapters=True, autocast=False)),
            trains="factors",
            obstacle=_only_16_bits(_needs("peft")),
        ),
        Contender(
            name="peft fp32, autocast",
            summary="LoRA of the peft library, adapters in fp32, under autocast",
            build=_each(partial(_peft, fp32_adapters=True, autocast=True)),
            trains="factors",
            obstacle=_only_16_bits(_needs("peft")),
        ),
        Contender(
            name="unsloth",
            summary="LoRA by Unsloth's fused autograd function",
            build=_each(Unsloth),
            trains="factors",
            obstacle=_needs("unsloth", only_gpu=True),
        ),
        *(_backend(name) for name in ("reference", "triton", "cuda")),
        *(_backend(name, shared=True) for name in ("reference", "triton", "cuda")),
        *(_lora(name, shared) for name in ("reference", "triton") for shared in (False, True)),
    )
}

__all__ = ["CONTENDERS", "Contender", "Published"]
