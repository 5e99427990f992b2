"""Training steps of adapters: optimizers, optimal steps, packed cores, CUDA graphs."""

from lorasb_kernels.optim.captured_step import CapturedStep
from lorasb_kernels.optim.lora_pro import LoRAProAdamW
from lorasb_kernels.optim.optimal_step import correct_steps
from lorasb_kernels.optim.packed_cores import PackedCores
from lorasb_kernels.optim.preconditioned import PreconditionedAdamW, split_parameters

__all__ = [
    "CapturedStep",
    "LoRAProAdamW",
    "PackedCores",
    "PreconditionedAdamW",
    "correct_steps",
    "split_parameters",
]
