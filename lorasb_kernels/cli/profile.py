"""Show what the adapted layers of a model cost: time, share of the roofline, memory.

Measures on this machine's GPU, writes a Chrome trace, and compares the performance model with what
it measured. With --gpu it predicts instead: a lower bound for the model, then the time of each
limit of every kernel, and the block's multiple over the frozen one; predictions are marked.

    lorasb profile --model mistral-7b --rank 96 --tokens 8192
    lorasb profile --model <folder or hub id> --rank 96 --tokens 8192 --gpu a6000
"""

import argparse

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the sizes, and where."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder, hub id, llama-3.2-3b, mistral-7b, gemma-2-9b or roberta-large",
    )
    parser.add_argument("--rank", type=int, default=96, help="default 96")
    parser.add_argument("--tokens", type=int, default=8192, help="default 8192")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--gpu", help="predict for a6000, a100, h100, h200, l40s, 4090 or 5090")
    parser.add_argument("--tiles", action="store_true", help="with --gpu: show every tile")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="measure here (default cuda)")
    parser.add_argument("--backend", default="auto", help="auto, reference, triton or cuda")
    parser.add_argument("--trace", default="lorasb-trace.json", help="Chrome trace to write")
    parser.add_argument("--results", default="bench/results", help="measurements, to judge by")


def run(options: argparse.Namespace) -> int:
    """Predicts or measures, and prints."""
    import os

    import torch

    from lorasb_kernels.hardware.gpus import find_gpu
    from lorasb_kernels.profiling.measurement import measure
    from lorasb_kernels.profiling.model_tables import model_report
    from lorasb_kernels.profiling.prediction import (
        check_rank,
        model_kinds,
        predict,
        prediction_errors,
        preset_of,
    )
    from lorasb_kernels.profiling.results import read_all

    if options.tokens < 1:
        raise InputError(f"tokens is {options.tokens}; expected at least 1")
    if options.gpu and options.device:
        raise InputError("gpu and device are both given; expected one: predict or measure")
    dtype = getattr(torch, options.dtype)
    try:
        if options.gpu:
            gpu = find_gpu(options.gpu)
            kinds = model_kinds(options.model)
            sizes = (options.tokens, options.rank)
            print(predict(kinds, *sizes, dtype, gpu))
            if dtype.itemsize == 2:
                preset = preset_of(options.model)
                print(f"\n{model_report(gpu, preset, *sizes, every_tile=options.tiles)}")
            else:
                print("\nThe performance model covers 16 bits: no more than the bound above.")
            known = read_all(options.results) if os.path.exists(options.results) else []
            print(f"\n{prediction_errors(known)}")
            return 0
        device = torch.device(options.device or "cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "no CUDA device is available; expected one, or --gpu a6000 to predict, or "
                "--device cpu to measure this CPU"
            )
        kinds = model_kinds(options.model)
        check_rank((kind.layer for kind in kinds), options.rank)
        print(
            measure(
                *(kinds, options.tokens, options.rank, dtype, device),
                backend=options.backend,
                trace=options.trace,
            )
        )
        print(f"\nChrome trace: {options.trace}")
        if device.type == "cuda" and dtype.itemsize == 2:
            print(f"\n{_checked(kinds, options, dtype, device)}")
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from error
    return 0


def _checked(kinds, options: argparse.Namespace, dtype, device) -> str:
    """The performance model held against this GPU."""
    import torch

    from lorasb_kernels.hardware.gpus import find_gpu
    from lorasb_kernels.profiling.model_check import check_model

    name = torch.cuda.get_device_name(device)
    try:
        gpu = find_gpu(name)
    except ValueError:
        return f"The performance model has no rates of {name}: nothing to compare."
    layers = list({(k.layer.n, k.layer.m): k.layer for k in kinds}.values())
    tokens = sorted({max(1, options.tokens // 16), options.tokens})
    table = check_model(gpu, layers, tokens, options.rank, dtype, device)
    return f"The performance model's error on {name}, kernels in CUDA graphs:\n\n{table}"
