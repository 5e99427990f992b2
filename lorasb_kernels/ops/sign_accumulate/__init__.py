from lorasb_kernels.ops.sign_accumulate.api import sign_accumulate_

__all__ = ["sign_accumulate_"]
