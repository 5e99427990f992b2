"""Show which backend, route and tiles a layer would run with, and why.

lorasb explain 4096 4096 --r 96 --tokens 8192 --arch sm_86
"""

import argparse

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layer's shape and the device."""
    parser.add_argument("out_features", type=int)
    parser.add_argument("in_features", type=int)
    parser.add_argument("--r", type=int, default=96, help="rank (default 96)")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the input")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dropout", type=float, default=0.0, help="on the adapter's input")
    parser.add_argument("--backend", default="auto", help="auto, reference, triton or cuda")
    parser.add_argument("--arch", help="plan for sm_80, 86, 89, 90, 100 or 120, without a device")


def run(options: argparse.Namespace) -> int:
    """Prints the explanation."""
    import torch

    from lorasb_kernels import explain

    try:
        explanation = explain(
            (options.out_features, options.in_features, options.r),
            tokens=options.tokens,
            backend=options.backend,
            dtype=getattr(torch, options.dtype),
            dropout=options.dropout,
            arch=options.arch,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from error
    print(explanation)
    return 0
