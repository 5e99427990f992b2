from lorasb_kernels.ops.factor_gradient.api import factor_gradient

__all__ = ["factor_gradient"]
