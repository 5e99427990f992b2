"""Merge an adapter into its base model and save a plain model for transformers.

The base model is read and written one safetensors file at a time, in its own dtype. With
--num-labels the model is a classifier whose head is new: it is merged in memory.

    lorasb merge --model <folder or hub id> --adapter <folder or hub id> --out <new folder>
"""

import argparse
from pathlib import Path

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Base model, adapter, output."""
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--adapter", required=True, help="folder or hub id of the adapter")
    parser.add_argument("--out", required=True, help="new folder for the merged model")
    parser.add_argument("--num-labels", type=int, help="number of labels, for a classifier")


def run(options: argparse.Namespace) -> int:
    """Merges and saves."""
    output = Path(options.out)
    if output.exists():
        raise InputError(f"--out is {options.out!r}, which exists; expected a new folder")
    try:
        if options.num_labels is None:
            from lorasb_kernels import merge_checkpoint

            merge_checkpoint(options.model, options.adapter, output)
        else:
            _merge_classifier(options, output)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    print(f"merged model: {output}")
    return 0


def _merge_classifier(options: argparse.Namespace, output: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lorasb_kernels import load_adapter, merge_and_unload
    from lorasb_kernels.utils.files import atomic_folder

    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, dtype="auto", num_labels=options.num_labels
    )
    load_adapter(model, options.adapter)
    merge_and_unload(model, safe_merge=True)
    with atomic_folder(output) as building:
        model.save_pretrained(building)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(building)
