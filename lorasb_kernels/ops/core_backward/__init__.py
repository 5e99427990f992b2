from lorasb_kernels.ops.core_backward.api import core_backward

__all__ = ["core_backward"]
