"""The kernels of `experts_linear`: one launch each, which finds every expert on the device."""

from lorasb_kernels.ops.triton.experts.core_backward import experts_core_backward
from lorasb_kernels.ops.triton.experts.expand import experts_expand
from lorasb_kernels.ops.triton.experts.projection import experts_shrink

__all__ = ["experts_core_backward", "experts_expand", "experts_shrink"]
