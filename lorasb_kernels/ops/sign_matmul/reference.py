"""Product with a packed sign matrix in plain PyTorch, unpacking a panel of rows at a time."""

from lorasb_kernels.ops import bitplanes
from lorasb_kernels.ops.precision import autocast_disabled


@autocast_disabled
def sign_matmul(positive, negative, dense, columns, transpose):
    m, q = positive.shape[0], dense.shape[1]
    out = dense.new_zeros(columns if transpose else m, q)
    for rows in bitplanes.panels(m, columns, bitplanes.UNPACKED_AT_ONCE):
        panel = bitplanes.unpack(positive[rows], negative[rows], columns)
        if transpose:
            out.addmm_(panel.T, dense[rows])
        else:
            out[rows] = panel @ dense
    return out


__all__ = ["sign_matmul"]
