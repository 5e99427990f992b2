from lorasb_kernels.ops.sign_gradient.api import sign_gradient

__all__ = ["sign_gradient"]
