from lorasb_kernels.ops.lorasb_linear.api import lorasb_group, lorasb_linear
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer
from lorasb_kernels.ops.lorasb_linear.siblings import CommonInput

__all__ = ["CommonInput", "FrozenLayer", "lorasb_group", "lorasb_linear"]
