from lorasb_kernels.ops.expand.api import expand

__all__ = ["expand"]
