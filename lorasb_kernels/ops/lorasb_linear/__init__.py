from lorasb_kernels.ops.lorasb_linear.api import lorasb_group, lorasb_linear

__all__ = ["lorasb_group", "lorasb_linear"]
