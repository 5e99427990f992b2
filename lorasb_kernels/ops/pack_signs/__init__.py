from lorasb_kernels.ops.pack_signs.api import pack_signs

__all__ = ["pack_signs"]
