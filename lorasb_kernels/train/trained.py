"""A finished run, loaded to be evaluated on any number of test sets."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.train.config import ADAPTER_METHODS, TrainConfig
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.output_folder import ADAPTER_FOLDER
from lorasb_kernels.train.run import Rows, load_model, make_encoder, read_training
from lorasb_kernels.utils.files import read_json


def read_config(folder: Path, **changes) -> TrainConfig:
    """The settings of the run in `folder`, with some of the evaluation's replaced.

    Raises:
        ConfigError: no settings there, or unusable ones.
    """
    try:
        stored = read_json(folder / "config.json")
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        stored = {name: value for name, value in stored.items() if name in known}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"run is {str(folder)!r}: {error}; expected a run's output") from error
    return TrainConfig(**{**stored, **changes, "output_dir": str(folder)})


def load_trained(config: TrainConfig) -> tuple[nn.Module, Encoder]:
    """The trained model of the run that `config` describes, in evaluation mode, and its encoder.

    Raises:
        ConfigError: the run has not saved its model.
    """
    folder = Path(config.output_dir)
    full = config.method == "full"
    saved = folder / ("model" if full else ADAPTER_FOLDER)
    if not (folder / "result.json").exists() or not saved.is_dir():
        raise ConfigError(f"run is {str(folder)!r}, which has not finished; expected a trained one")
    # The labels of the training rows say how many classes the head has.
    rows: Rows = read_training(config) if config.task == "classification" else ()
    own = dataclasses.replace(config, model=str(saved)) if full else config
    model, tokenizer = load_model(own, rows)
    if config.method in ADAPTER_METHODS:
        from lorasb_kernels import load_adapter

        load_adapter(model, saved)
    elif not full:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(saved))
    for parameter in model.parameters():
        if parameter.requires_grad:  # as in training
            parameter.data = parameter.data.float()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), make_encoder(config, tokenizer)
