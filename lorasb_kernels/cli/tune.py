"""Measure on this GPU which route the frozen product takes, for all shapes of a model.

What `auto` otherwise does at the first use of a shape: for the forward product and the input
gradient of each shape it times cuBLAS with an in-place expansion, the fused kernel and, on Hopper,
the fused kernel with tensor maps, and keeps the times in this device's file in the cache folder
($LORASB_CACHE, else ~/.cache/lorasb). Of a model without dropout, also the input gradient that
layers on one input compute together (`share_inputs`). Shapes that are in it already are skipped;
LORASB_TUNE=now measures them again. Needs a CUDA device.

    lorasb tune --model mistral-7b --r 96 --tokens 8192 2048
    lorasb tune --layer 4096 4096 --layer 14336 4096
"""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorasb_kernels.train.errors import InputError

if TYPE_CHECKING:
    from lorasb_kernels.profiling.shapes import Layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes."""
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument(
        "--model", help="folder, hub id, llama-3.2-3b, mistral-7b, gemma-2-9b or roberta-large"
    )
    shapes.add_argument(
        "--layer",
        type=int,
        nargs=2,
        action="append",
        metavar=("OUT", "IN"),
        help="output and input features of a layer; may be repeated",
    )
    parser.add_argument("--r", type=int, default=96, help="rank (default 96)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="rows of the input")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the adapter's input")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--all-tiles", action="store_true", help="time every tile that fits, not the first few"
    )


def siblings_of(layers: "Iterable[Layer]") -> "list[tuple[Layer, int]]":
    """The first layer of each group on one input, and how many the group has.

    Args:
        layers: of a model, by name and shape.
    """
    from lorasb_kernels.nn.shared_input import SIBLINGS

    found = []
    for names in SIBLINGS:
        by_input: dict[int, list[Layer]] = {}
        for layer in layers:
            if layer.name in names:
                by_input.setdefault(layer.n, []).append(layer)
        for group in by_input.values():
            present = sorted({layer.name for layer in group}, key=names.index)
            if len(present) > 1:
                firsts = [layer for layer in group if layer.name == present[0]]
                found += [(first, len(present)) for first in firsts]
    return found


def run(options: argparse.Namespace) -> int:
    """Measures and keeps."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device is available; expected one: nothing else is timed")
    from lorasb_kernels.ops.layer_shape import LayerShape
    from lorasb_kernels.ops.triton.route_files import device_file
    from lorasb_kernels.ops.tune import tune
    from lorasb_kernels.profiling.prediction import model_kinds

    try:
        sizes, summed = options.layer, []
        if options.model:
            kinds = model_kinds(options.model)
            if options.dropout == 0:  # with it, each sibling has a mask of its own
                summed = siblings_of([kind.layer for kind in kinds])
            sizes = dict.fromkeys((kind.layer.m, kind.layer.n) for kind in kinds)
        layers = [
            LayerShape(tokens, m, n, options.r, options.dropout)
            for m, n in sizes
            for tokens in options.tokens
        ]
        tune(
            layers,
            siblings=[
                LayerShape(tokens, first.m, first.n, count * options.r)
                for first, count in summed
                for tokens in options.tokens
            ],
            dtype=getattr(torch, options.dtype),
            all_tiles=options.all_tiles,
            progress=print,
        )
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    print(f"kept in {device_file(torch.device('cuda')).path}")
    return 0
