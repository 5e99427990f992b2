from lorasb_kernels.ops.lorasb_linear.api import lorasb_group, lorasb_linear
from lorasb_kernels.ops.lorasb_linear.around import lorasb_around

__all__ = ["lorasb_around", "lorasb_group", "lorasb_linear"]
