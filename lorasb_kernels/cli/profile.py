"""Show what the adapted layers of a model cost: time, share of the roofline, memory.

Measures on this machine's GPU and writes a Chrome trace. With --gpu it predicts a lower bound for
another GPU instead; a prediction is marked as one.

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
    parser.add_argument("--gpu", help="predict for a6000, a100, l40s, rtx4090, h100 or h200")
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
    from lorasb_kernels.profiling.prediction import model_kinds, predict, prediction_errors
    from lorasb_kernels.profiling.results import read_all

    if options.tokens < 1:
        raise InputError(f"tokens is {options.tokens}; expected at least 1")
    if options.gpu and options.device:
        raise InputError("gpu and device are both given; expected one: predict or measure")
    dtype = getattr(torch, options.dtype)
    try:
        if options.gpu:
            gpu = find_gpu(options.gpu)
            print(predict(model_kinds(options.model), options.tokens, options.rank, dtype, gpu))
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
        print(
            measure(
                *(kinds, options.tokens, options.rank, dtype, device),
                backend=options.backend,
                trace=options.trace,
            )
        )
        print(f"\nChrome trace: {options.trace}")
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(str(error)) from error
    return 0
