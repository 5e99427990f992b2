"""The operations as functions."""

from lorasb_kernels.ops.lorasb_linear import lorasb_linear

__all__ = ["lorasb_linear"]
