from lorasb_kernels.ops.lorasb_linear.api import lorasb_group, lorasb_linear
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer

__all__ = ["FrozenLayer", "lorasb_group", "lorasb_linear"]
