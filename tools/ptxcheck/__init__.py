"""Run compiled GPU kernels (PTX) on the CPU to check what they compute."""

from .errors import (
    BarrierError,
    CompileError,
    DeadlockError,
    ExecutionError,
    MemoryFault,
    PtxError,
    PtxSyntaxError,
    RaceError,
    StepLimitExceeded,
    TrapError,
    UninitializedRead,
    UnsupportedInstruction,
)
from .memory import Memory
from .module import Module, load
from .nvcc import nvcc_ptx
from .stats import Stats
from .tensormap import TensorMap
from .triton_front import TritonKernel, gluon_descriptor, triton_compile

__all__ = [
    "BarrierError",
    "CompileError",
    "DeadlockError",
    "ExecutionError",
    "Memory",
    "MemoryFault",
    "Module",
    "PtxError",
    "PtxSyntaxError",
    "RaceError",
    "Stats",
    "StepLimitExceeded",
    "TensorMap",
    "TrapError",
    "TritonKernel",
    "UninitializedRead",
    "UnsupportedInstruction",
    "gluon_descriptor",
    "load",
    "nvcc_ptx",
    "triton_compile",
]
