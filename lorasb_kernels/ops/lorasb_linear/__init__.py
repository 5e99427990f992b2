from lorasb_kernels.ops.lorasb_linear.api import lorasb_linear

__all__ = ["lorasb_linear"]
