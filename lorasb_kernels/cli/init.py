r"""Initialize the adapters of a run, or predict what that takes, without training.

Takes the settings of `lorasb train`. The adapter is written to output_dir/adapter, from
which `lorasb train` with the same settings starts; a table of the layers (init.json) and a plot of
the captured energy (init.png) are written to output_dir. With --dry-run only the model's
configuration, its tokenizer and the data are read, no weights; --gpu predicts for another device.

    lorasb init --preset arithmetic --model <folder or hub id> --data train.jsonl \
        --output-dir out/run --dry-run
"""

import argparse
from pathlib import Path

from lorasb_kernels.cli import train
from lorasb_kernels.config import INITS
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.errors import ConfigError, setting_errors
from lorasb_kernels.train.settings_file import load_file, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a run, and --dry-run."""
    train.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="predict memory and time")
    parser.add_argument(
        "--gpu", help="with --dry-run: predict for a6000, a100, h100, h200, l40s, 4090 or 5090"
    )


def run(options: argparse.Namespace) -> int:
    """Initializes, or predicts, and prints a table."""
    from lorasb_kernels.hardware.gpus import find_gpu

    if options.gpu and not options.dry_run:
        raise ConfigError(f"--gpu is {options.gpu!r} without --dry-run; expected both, to predict")
    with setting_errors("--"):
        gpu = find_gpu(options.gpu) if options.gpu else None
    flags = train.given_flags(options)
    config = resolve((load_file(options.config) if options.config else {}) | flags)
    taking_samples = [name for name, facts in INITS.items() if facts.needs_gradients]
    if config.adapter_init not in taking_samples:
        raise ConfigError(
            f"method is {config.method!r}; expected one that takes samples: "
            f"{', '.join(taking_samples)}"
        )
    print(predict(config, gpu) if options.dry_run else initialize(config))
    return 0


def predict(config: TrainConfig, gpu=None) -> str:
    """The prediction for the run that `config` describes, as a table; for this machine if `gpu`
    is None."""
    import torch

    from lorasb_kernels.init.predict import predict_init
    from lorasb_kernels.targets import find_targets
    from lorasb_kernels.train.methods import heads
    from lorasb_kernels.train.run import encode, read_training
    from lorasb_kernels.train.start_samples import fixed_count, largest_count, start_batches

    rows = read_training(config)
    with torch.device("meta"):
        model, encoder = _skeleton(config)
    rows = encode(encoder, config, rows, "training")
    measured = config.init_samples == "auto"  # what takes weights, so the limit is predicted
    count = (largest_count if measured else fixed_count)(config, len(rows))
    cpu = torch.device("cpu")
    batches = list(start_batches(config, rows, encoder.pad_token_id, cpu, count))
    samples = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    saved = heads(model) if config.task == "classification" else ()
    where, room, rates = _device(config) if gpu is None else _described(config, gpu)
    prediction = predict_init(
        model,
        find_targets(model, config.target_modules, saved),
        r=config.r,
        samples=samples,
        tokens=-(-tokens // samples),
        micro_batch=min(samples, config.init_batch_size or config.batch_size),
        rates=rates,
        labelled_tokens=max(map(_labelled_columns, batches)),
    )
    most = "at most " if measured else ""
    return f"{prediction}\n{most}{samples} samples, {tokens} tokens; {where} with {room}"


def _device(config: TrainConfig) -> tuple:
    """This machine's device, its free memory in words, and its measured rates."""
    import torch

    from lorasb_kernels.init.estimation.memory import free_memory
    from lorasb_kernels.init.predict import Rates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory(device)
    room = "unknown memory" if free is None else f"{free / 1e9:.1f} GB free"
    return device, room, Rates.measure(device, getattr(torch, config.dtype), config.r)


def _described(config: TrainConfig, gpu) -> tuple:
    """The same of a known GPU: its whole memory, and published rates."""
    from lorasb_kernels.init.predict import Rates

    return gpu.device_name, f"{gpu.memory_gb:g} GB", Rates.of(gpu, config.dtype)


def _labelled_columns(batch: dict) -> int:
    """Positions at which a language model's logits are needed; 0 for a classifier."""
    from lorasb_kernels.init.estimation.losses import IGNORED

    labels = batch["labels"]
    return int((labels[:, 1:] != IGNORED).any(0).sum()) if labels.dim() == 2 else 0


def _skeleton(config: TrainConfig):
    """The model of `config` without weights, and its encoder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from lorasb_kernels.train.run import load_tokenizer, make_encoder

    causal = config.task == "causal-lm"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = kind.from_config(
        AutoConfig.from_pretrained(config.model), dtype=getattr(torch, config.dtype)
    )
    return model, make_encoder(config, load_tokenizer(config))


def initialize(config: TrainConfig) -> str:
    """Initializes and saves the adapter of `config`; returns the report as a table."""
    from lorasb_kernels.init.report import InitReport
    from lorasb_kernels.train.methods import save_start
    from lorasb_kernels.train.output_folder import ADAPTER_FOLDER, claim, difference, locked
    from lorasb_kernels.train.run import load, make_trainable, read_training
    from lorasb_kernels.train.trainer import training_arguments

    folder = Path(config.output_dir)
    if (folder / ADAPTER_FOLDER).exists():
        raise ConfigError(f"output_dir {str(folder)!r} holds an adapter; expected another one")
    rows = read_training(config)
    with locked(folder):
        replaces = difference(folder, config, rows)
        model, encoder, samples = load(config, rows, training_arguments(config).device)
        model, _ = make_trainable(model, config, encoder, samples)
        claim(folder, config, rows, replaces is not None)
        save_start(model, config)
        report = InitReport.of(model)
        report.save(folder / "init.json")
        report.plot(folder / "init.png")
    return f"{report}\nwritten to {folder}: {ADAPTER_FOLDER}, init.json, init.png"
