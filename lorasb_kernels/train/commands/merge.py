"""Merge an adapter into its base model and save a plain model for transformers.

lorasb merge <base model> <adapter folder> <output folder>
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.config import DTYPES
from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base model, adapter, output."""
    parser.add_argument("model", help="folder or hub id of the base model")
    parser.add_argument("adapter", help="folder of the adapter, as `lorasb train` saves it")
    parser.add_argument("output", help="new folder for the merged model")
    parser.add_argument("--num-labels", type=int, help="the model is a classifier of so many")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the merged model")
    parser.add_argument("--safe-merge", action="store_true", help="refuse non-finite weights")


def run(options: argparse.Namespace) -> int:
    """Loads, merges, saves."""
    output = Path(options.output)
    if output.exists():
        raise InputError(f"output is {options.output!r}, which exists; expected a new folder")

    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    from lorasb_kernels import load_adapter, merge_and_unload
    from lorasb_kernels.train.files import atomic_folder

    dtype = getattr(torch, options.dtype)
    try:
        if options.num_labels is None:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                options.model, dtype=dtype, num_labels=options.num_labels
            )
        load_adapter(model, options.adapter)
        merge_and_unload(model, safe_merge=options.safe_merge)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    with atomic_folder(output) as building:
        model.save_pretrained(building)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(building)
    print(f"merged model: {output}")
    return 0
