"""Evaluation after every epoch, and the epoch that is kept: the last or the best.

    output_dir/epochs.json          the metric by epoch
    output_dir/best.safetensors     what was trained, after the best epoch so far

Both survive a killed run: an epoch that is trained again after a restart has the same metric.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.utils.files import read_json, write_json, write_tensors

EPOCHS_FILE = "epochs.json"
BEST_FILE = "best.safetensors"


def best_epoch(values: dict[str, float], metric: str) -> str:
    """The earliest epoch with the best value; a loss is better if it is lower."""
    sign = -1 if metric == "loss" else 1
    return max(values, key=lambda epoch: (sign * values[epoch], -float(epoch)))


class EpochEvaluation(TrainerCallback):
    """Evaluates at the end of every epoch, for runs with `evaluate_every: epoch`.

    Args:
        config: the run.
        evaluate: returns the metric of the model as it is.
        trained: returns the tensors that training changes, by name.
        writes: whether this process is the one that writes files.
    """

    def __init__(
        self,
        config: TrainConfig,
        evaluate: Callable[[], float],
        trained: Callable[[], dict[str, torch.Tensor]],
        writes: bool,
    ):
        self.config, self.evaluate, self.trained, self.writes = config, evaluate, trained, writes
        self.folder = Path(config.output_dir)

    def on_epoch_end(self, args, state, control, **_):
        values = epoch_values(self.folder)
        epoch = f"{state.epoch:g}"
        values[epoch] = self.evaluate()
        if not self.writes:
            return
        best = best_epoch(values, self.config.evaluation) == epoch
        if best and self.config.select == "best":
            write_tensors(self.folder / BEST_FILE, self.trained())
        write_json(self.folder / EPOCHS_FILE, values)


def epoch_values(folder: Path) -> dict[str, float]:
    """The metric by epoch, as far as the run has come."""
    path = folder / EPOCHS_FILE
    return read_json(path) if path.exists() else {}


@torch.no_grad()
def restore_best(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Gives the trained tensors the values that they had after the best epoch."""
    best = load_file(folder / BEST_FILE)
    for name, tensor in trained.items():
        tensor.copy_(best[name])
