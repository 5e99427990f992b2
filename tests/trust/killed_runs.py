"""Training runs that die: each is forked from a process that has imported everything once.

    python -m tests.trust.killed_runs MODEL FOLDER '[["kill", 7], ["disk", 4], …]'

prints a line of JSON for each fault. A run is killed at its n-th change to a file (created,
written, renamed or removed), which could leave a partial checkpoint, or after a number of seconds;
then it is started again until it ends.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from lorasb_kernels.train import run
from lorasb_kernels.train.checkpoint import check
from lorasb_kernels.train.output_folder import checkpoints
from tests.train.conftest import sums, tiny_config
from tests.trust.watching import tree

STEPS, SAVE_STEPS, ROWS = 6, 2, 24
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def config(model: Path, folder: Path):
    return tiny_config(
        model,
        folder,
        batch_size=4,
        dropout=0.2,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        keep_checkpoints=1,
        init_minimum=4,
    )


def forked(work: Callable[[], None], seconds: float | None = None) -> tuple[int, str]:
    """Runs `work` in a fork; returns its exit status (−9: killed) and the error it ended with."""
    return ended(start(work), seconds)


def start(work: Callable[[], None]) -> tuple[int, int]:
    """Starts `work` in a fork; returns its process id and the pipe it writes its error to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = 0
        try:
            work()
        except BaseException as error:
            status = 1
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        os._exit(status)
    os.close(writer)
    return child, reader


def ended(started: tuple[int, int], seconds: float | None = None) -> tuple[int, str]:
    """Waits for a fork; kills it after `seconds`."""
    child, reader = started
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, errors="replace") as pipe:
        error = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), error


def on_changes(act: Callable[[int], None]) -> list[str]:
    """From now on, calls `act(n)` just before this process's n-th change to a file.

    Returns:
        The changes, as they come.
    """
    seen: list[str] = []

    def listen(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if writes or event in _CHANGES:
            seen.append(event)
            act(len(seen))

    sys.addaudithook(listen)
    return seen


class AtStep(TrainerCallback):
    """Calls `act(model)` at the start of a step."""

    def __init__(self, step: int, act: Callable):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == self.step:
            self.act(model)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(model) -> None:
    def raise_at_forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")

    model.register_forward_pre_hook(raise_at_forward)


def not_a_number(model) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


def full_disk(bytes_left: int) -> None:
    """Limits every file of this process to this many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))


class Runs:
    """Runs of one configuration, each in its own folder."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.folder, self.count = model, folder, 0

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def train(self, folder: Path, *callbacks) -> None:
        run.finetune(config(self.model, folder), sums(ROWS), callbacks=callbacks)

    def finish(self, folder: Path) -> dict:
        """Starts the run again until it ends; returns its outcome."""
        status, error = forked(lambda: self.train(folder))
        result = folder / "result.json"
        losses = json.loads(result.read_text())["losses"] if result.exists() else None
        left = sorted(path.name for path in folder.rglob(".*"))
        return {"status": status, "error": error, "losses": losses, "remains": left}

    def fault(self, kind: str, value) -> dict:
        """One fault, and the run after it."""
        folder = self.new_folder()

        def faulty() -> None:
            if kind == "kill":
                on_changes(lambda count: die() if count == value else None)
            act = {
                "memory": out_of_memory,
                "nan": not_a_number,
                "disk": lambda _: full_disk(2000),
            }
            self.train(folder, *([AtStep(value, act[kind])] if kind in act else []))

        seconds = value if kind == "time" else None
        status, error = forked(faulty, seconds)
        found = checkpoints(folder)
        for checkpoint in found:
            check(checkpoint, processes=1)
        hidden = sorted(path.name for path in folder.glob(".checkpoint*"))
        first = {"status": status, "error": error, "hidden": hidden}
        first["steps"] = [int(path.name[11:]) for path in found]
        return {"first": first, "second": self.finish(folder)}

    def damaged(self, name: str) -> dict:
        """A bit of a file of the newest checkpoint flipped, and the run after it."""
        folder = self.new_folder()
        forked(lambda: self.train(folder, AtStep(SAVE_STEPS + 1, lambda _: die())))
        path = checkpoints(folder)[-1] / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        before = tree(folder)
        second = self.finish(folder)
        return {"second": second, "untouched": tree(folder) == before}

    def pair(self, folder: Path, *callbacks) -> list[tuple[int, str]]:
        """Two data-parallel processes; the callbacks are those of the second."""
        port, started = free_port(), []
        for rank in range(2):

            def work(rank=rank) -> None:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ["MASTER_ADDR"] = "127.0.0.1"
                self.train(folder, *(callbacks if rank else ()))

            started.append(start(work))
        return [ended(process) for process in started]

    def worker(self, step: int) -> dict:
        """The second of two processes is killed at a step; both are started again."""
        whole, folder = self.new_folder(), self.new_folder()
        self.pair(whole)
        first = self.pair(folder, AtStep(step, lambda _: die()))
        steps = [int(path.name[11:]) for path in checkpoints(folder)]
        alone = self.finish(folder)
        second = self.pair(folder)
        losses = [json.loads((f / "result.json").read_text())["losses"] for f in (whole, folder)]
        return {"first": first, "steps": steps, "alone": alone, "second": second, "losses": losses}

    def whole(self) -> dict:
        """A run without a fault, with its seconds and changes to files."""
        folder, counter = self.new_folder(), self.folder / "changes"

        def counted() -> None:
            seen = on_changes(lambda count: None)
            self.train(folder)
            counter.write_text(str(len(seen)))

        began = time.perf_counter()
        status, error = forked(counted)
        seconds = time.perf_counter() - began
        losses = json.loads((folder / "result.json").read_text())["losses"] if not status else error
        return {"losses": losses, "seconds": seconds, "changes": int(counter.read_text())}


def main() -> None:
    model, folder, faults = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    runs = Runs(model, folder)
    whole = runs.whole()
    print(json.dumps(whole), flush=True)
    for kind, value in faults:
        if kind == "kill":  # a share of the run's changes to files
            outcome = runs.fault(kind, max(1, round(value * whole["changes"])))
        elif kind == "time":
            outcome = runs.fault(kind, value * whole["seconds"])
        elif kind in ("damaged", "worker"):
            outcome = getattr(runs, kind)(value)
        else:
            outcome = runs.fault(kind, value)
        print(json.dumps({"fault": [kind, value], **outcome}), flush=True)


if __name__ == "__main__":
    main()
