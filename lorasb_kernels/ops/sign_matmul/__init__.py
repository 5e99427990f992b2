from lorasb_kernels.ops.sign_matmul.api import sign_matmul

__all__ = ["sign_matmul"]
