r"""Show what an adapter costs: layers, shapes, ranks, trainable and frozen counts, bytes.

With --adapter it describes a saved adapter, otherwise the one given by the flags. With --seq it
also counts the multiply-accumulates (MACs) and FLOPs of a forward pass over one sequence. Only the
model's configuration is read, no weights.

    lorasb describe <folder or hub id> --r 96
    lorasb describe mistral-7b --r 96
    lorasb describe roberta-large --task classification --init lora --r 8 --seq 256 \
        --target-modules query value attention.output.dense output.dense
"""

import argparse
from pathlib import Path

from lorasb_kernels.config import INITS
from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and an adapter or its settings."""
    parser.add_argument(
        "model",
        help="folder, hub id, llama-3.2-3b, mistral-7b, gemma-2-9b or roberta-large; the last is "
        "the hub's with --task classification",
    )
    parser.add_argument("--adapter", help="folder of a saved adapter")
    parser.add_argument("--r", type=int, default=16, help="rank (default 16)")
    parser.add_argument(
        "--init", choices=INITS, default="lora-sb", help="what is trained (default lora-sb)"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        help="'all-linear', one pattern, or several name suffixes",
    )
    parser.add_argument(
        "--task",
        choices=("causal-lm", "classification"),
        default="causal-lm",
        help="the model's head (default causal-lm)",
    )
    parser.add_argument("--seq", type=int, help="tokens of the sequence whose MACs are counted")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    from lorasb_kernels import LoRASBConfig, describe
    from lorasb_kernels.profiling.shapes import PRESETS
    from lorasb_kernels.profiling.skeleton import Skeleton

    targets = options.target_modules
    if options.seq is not None and options.seq < 1:
        raise InputError(f"--seq is {options.seq}; expected a number of tokens >= 1")
    try:
        if options.adapter:
            import json

            record = json.loads((Path(options.adapter) / "lorasb_config.json").read_text())
            config = LoRASBConfig.from_dict(record["config"])
        else:
            config = LoRASBConfig(
                options.r,
                targets[0] if len(targets) == 1 else tuple(targets),
                options.init,
            )
        classifier = options.task == "classification"
        kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        preset = None if classifier else PRESETS.get(options.model)
        if preset is not None:
            model = Skeleton(preset)
        else:
            with torch.device("meta"):
                model = kind.from_config(AutoConfig.from_pretrained(options.model))
        description = describe(model, config)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error
    print(description)
    if options.seq is not None:
        macs = description.macs(options.seq)
        print(
            f"forward pass over {options.seq} tokens: {macs / 1e9:.2f} G MACs, "
            f"{2 * macs / 1e9:.2f} GFLOPs in linear layers and adapters; attention scores, "
            "embeddings and normalizations are not counted"
        )
    return 0
