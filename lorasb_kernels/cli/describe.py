"""Show what an adapter costs: layers, shapes, ranks, trainable and frozen counts, bytes.

With --adapter, of a saved adapter; otherwise of the one that the flags describe. Only the
model's configuration is read, no weights.

    lorasb describe <folder or hub id> --r 96
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and an adapter or its settings."""
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--adapter", help="folder of a saved adapter")
    parser.add_argument("--r", type=int, default=16, help="rank (default 16)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        help="'all-linear', one pattern, or several name suffixes",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorasb_kernels import LoRASBConfig, describe

    targets = options.target_modules
    try:
        if options.adapter:
            import json

            record = json.loads((Path(options.adapter) / "lorasb_config.json").read_text())
            config = LoRASBConfig.from_dict(record["config"])
        else:
            config = LoRASBConfig(options.r, targets[0] if len(targets) == 1 else tuple(targets))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
        print(describe(model, config))
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error
    return 0
