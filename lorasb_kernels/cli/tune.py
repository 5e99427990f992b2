"""Measure on this GPU which route the frozen product takes, and save it.

For the forward product and the input gradient of each layer shape it times cuBLAS with an in-place
expansion, the fused kernel and, on Hopper, the fused kernel with tensor maps, and writes the times
to a JSON file. Set LORASB_TUNING to that file to use the fastest route. Needs a CUDA device.

    lorasb tune tuning.json --layer 4096 4096 --layer 14336 4096 --r 96 --tokens 8192 2048
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes and the file."""
    parser.add_argument("file", type=Path, help="JSON file to write or to extend")
    parser.add_argument(
        "--layer",
        type=int,
        nargs=2,
        action="append",
        required=True,
        metavar=("OUT", "IN"),
        help="output and input features of a layer; may be repeated",
    )
    parser.add_argument("--r", type=int, default=96, help="rank (default 96)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="rows of the input")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the adapter's input")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])


def run(options: argparse.Namespace) -> int:
    """Measures and writes."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device is available; expected one: nothing else is timed")
    from lorasb_kernels.ops.layer_shape import LayerShape
    from lorasb_kernels.ops.tune import tune

    try:
        layers = [
            LayerShape(tokens, m, n, options.r, options.dropout)
            for m, n in options.layer
            for tokens in options.tokens
        ]
        tune(layers, options.file, dtype=getattr(torch, options.dtype), progress=print)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {options.file}; set LORASB_TUNING={options.file} to use it")
    return 0
