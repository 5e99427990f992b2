"""Product with a packed sign matrix in plain PyTorch, unpacking a panel of rows at a time."""

from lorasb_kernels.ops.bitplanes import unpack
from lorasb_kernels.ops.precision import autocast_disabled

# Elements of S unpacked at a time: 4 MB of fp32, which stays in cache for the product.
PANEL = 1 << 20


@autocast_disabled
def sign_matmul(positive, negative, dense, columns, transpose):
    m, q = positive.shape[0], dense.shape[1]
    out = dense.new_zeros(columns if transpose else m, q)
    height = max(1, PANEL // columns)
    for start in range(0, m, height):
        rows = slice(start, start + height)
        panel = unpack(positive[rows], negative[rows], columns)
        if transpose:
            out.addmm_(panel.T, dense[rows])
        else:
            out[rows] = panel @ dense
    return out


__all__ = ["sign_matmul"]
