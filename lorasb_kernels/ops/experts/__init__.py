from lorasb_kernels.ops.experts.api import experts_linear

__all__ = ["experts_linear"]
