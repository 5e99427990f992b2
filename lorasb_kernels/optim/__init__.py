"""Optimizers for adapters: LoRA-One's and LoRA-Pro's AdamW, and all cores in one tensor."""

from lorasb_kernels.optim.lora_pro import LoRAProAdamW
from lorasb_kernels.optim.packed_cores import PackedCores
from lorasb_kernels.optim.preconditioned import PreconditionedAdamW, split_parameters

__all__ = ["LoRAProAdamW", "PackedCores", "PreconditionedAdamW", "split_parameters"]
