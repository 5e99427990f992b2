"""Optimizers for adapters: LoRA-One's preconditioned AdamW, and all cores in one tensor."""

from lorasb_kernels.optim.packed_cores import PackedCores
from lorasb_kernels.optim.preconditioned import PreconditionedAdamW, split_parameters

__all__ = ["PackedCores", "PreconditionedAdamW", "split_parameters"]
