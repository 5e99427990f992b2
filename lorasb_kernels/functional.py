"""The operations as functions."""

from lorasb_kernels.ops.experts import experts_linear
from lorasb_kernels.ops.lorasb_linear import FrozenLayer, lorasb_group, lorasb_linear
from lorasb_kernels.ops.pack_signs import pack_signs
from lorasb_kernels.ops.sign_accumulate import sign_accumulate_
from lorasb_kernels.ops.sign_gradient import sign_gradient
from lorasb_kernels.ops.sign_matmul import sign_matmul

__all__ = [
    "FrozenLayer",
    "experts_linear",
    "lorasb_group",
    "lorasb_linear",
    "pack_signs",
    "sign_accumulate_",
    "sign_gradient",
    "sign_matmul",
]
