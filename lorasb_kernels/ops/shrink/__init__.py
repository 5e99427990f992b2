from lorasb_kernels.ops.shrink.api import shrink

__all__ = ["shrink"]
