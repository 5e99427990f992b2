"""What training shows while it runs: a progress bar, or lines where there is no terminal."""

import sys

from rich.console import Console
from transformers import TrainerCallback

from lorasb_kernels.utils.progress import progress_bar

console = Console(highlight=False)  # for tables


class TrainingBar(TrainerCallback):
    """Shows the steps and the last loss; without a terminal, a line every tenth of the run."""

    def __init__(self, description: str):
        self.description, self.step = description, 0

    def on_train_begin(self, args, state, control, **_):
        self.bar = progress_bar(state.max_steps, self.description, "step")
        self._advance(state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        note = f"loss {float(logs['loss']):.4f}"
        self.bar.set_postfix_str(note)
        self._advance(state.global_step)
        tenth = max(1, state.max_steps // 10)
        if not sys.stderr.isatty() and state.global_step % tenth == 0:
            print(f"{self.description} {state.global_step}/{state.max_steps}  {note}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()

    def _advance(self, step: int) -> None:
        self.bar.update(step - self.step)
        self.step = step
