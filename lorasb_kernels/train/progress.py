"""Progress bars of training and evaluation, on the terminal of the main process."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

console = Console(highlight=False)


def bar() -> Progress:
    """A progress bar with a count, the time left and a note."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def track(description: str):
    """Returns a function that walks through a sequence under a progress bar."""

    def walk(items: Sequence) -> Iterator:
        with bar() as progress:
            task = progress.add_task(description, total=len(items), note="")
            for item in items:
                yield item
                progress.advance(task)

    return walk


class TrainingBar(TrainerCallback):
    """Shows the steps and the last loss; without a terminal, a line every tenth of the run."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **_):
        self.progress = bar()
        self.progress.start()
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        note = f"loss {float(logs['loss']):.4f}"
        self.progress.update(self.task, completed=state.global_step, note=note)
        tenth = max(1, state.max_steps // 10)
        if not console.is_terminal and state.global_step % tenth == 0:
            console.print(f"{self.description} {state.global_step}/{state.max_steps}  {note}")

    def on_train_end(self, args, state, control, **_):
        self.progress.stop()
