"""Predict whether a model fits on a GPU, and how long training takes, without having either.

Prints the peak memory of the initialization and of training by part, the largest batch, tokens per
second and hours an epoch, for weights in bf16, fp32 and 4 bits, without and with gradient
checkpointing. Only a model's configuration is read, no weights; nothing is run.

    lorasb plan --model mistral-7b --gpu a6000
    lorasb plan --model <folder or hub id> --gpu 4090 --rank 32 --batch-size 8 --rows 395000
"""

import argparse

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the GPU and the sizes."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder, hub id, llama-3.2-3b, mistral-7b, gemma-2-9b or roberta-large",
    )
    parser.add_argument(
        "--gpu", required=True, help="a6000, a100, h100, h200, l40s, 4090, 5090 or another known"
    )
    parser.add_argument("--rank", type=int, default=96, help="default 96")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="rows per forward pass (default 16)"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--rows", type=int, default=10000, help="of an epoch (default 10000)")
    parser.add_argument(
        "--init-rows", type=int, default=32, help="that the initialization takes (default 32)"
    )


def run(options: argparse.Namespace) -> int:
    """Predicts, and prints."""
    from lorasb_kernels.hardware.gpus import find_gpu
    from lorasb_kernels.profiling.plan import Work, plan
    from lorasb_kernels.profiling.prediction import check_rank, preset_of

    for flag in ("batch_size", "max_length", "rows", "init_rows"):
        if getattr(options, flag) < 1:
            name = flag.replace("_", "-")
            raise InputError(f"--{name} is {getattr(options, flag)}; expected at least 1")
    work = Work(
        options.rank, options.batch_size, options.max_length, options.rows, options.init_rows
    )
    try:
        gpu = find_gpu(options.gpu)
        model = preset_of(options.model)
        check_rank(model.layers, options.rank)
        print(plan(model, gpu, work))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    return 0
