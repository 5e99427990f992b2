"""Compare LoRA-SB, LoRA-XS, LoRA and full fine-tuning of MiniLM on sarcastic headlines.

Learning rates are chosen on a validation split, three seeds run with the best, and the test split
is read once per run. Every finished run is kept, so an interrupted comparison resumes.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and how much to run."""
    parser.add_argument("--output-dir", default="out/demo-compare", help="default out/demo-compare")
    parser.add_argument("--train-rows", type=int, default=2000, help="default 2000")
    parser.add_argument("--test-rows", type=int, default=2000, help="default 2000")
    parser.add_argument("--only", nargs="+", default=[], help="contenders, such as lora-sb-r8")


def run(options: argparse.Namespace) -> int:
    """Runs the comparison."""
    from lorasb_kernels.train.demo.compare import run_comparison

    run_comparison(options.output_dir, options.train_rows, options.test_rows, options.only)
    return 0
