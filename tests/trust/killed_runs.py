"""Training runs that die: each is forked from a process that has imported everything once.

    python -m tests.trust.killed_runs LLAMA BERT FOLDER '[["lora-sb", "kill", 0.7], …]'

prints a line of JSON for each kind of run when nothing happens to it, and one for each fault. A
run is killed at its n-th change to a file (made, written to, renamed or removed), which is where
half a checkpoint could come from, or after so many seconds; then it is started again until it
ends, and once more.
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

from lorasb_kernels.io.tensors import digest_of, read_tensors
from lorasb_kernels.train import run
from lorasb_kernels.train.checkpoint import check
from lorasb_kernels.train.output_folder import LOCK, checkpoints
from tests.train.conftest import reviews, sums, tiny_config
from tests.trust.watching import tree

STEPS, SAVE_STEPS, ROWS = 6, 2, 16
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
# They end within an epoch of four steps, where a run that is started again could train on.
KINDS = {
    "lora-sb": {},
    "lora-xs": {"method": "lora-xs", "batching": "packed", "batch_size": 2},
    "lora": {"method": "lora", "batch_size": 2, "accumulation": 2, "schedule": "cosine"},
    "lora-one": {"method": "lora-one", "max_steps": None, "epochs": 1.5},
    "full": {"method": "full", "learning_rate": 5e-3},
    "classifier": {"task": "classification", "dtype": "bfloat16"},
}


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
    """Runs of one kind in folders of their own."""

    def __init__(self, model: Path, folder: Path, kind: str):
        self.model, self.folder, self.kind, self.count = model, folder, kind, 0

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"{self.kind} {self.count}"

    def train(self, folder: Path, *callbacks) -> None:
        settings = {
            "batch_size": 4,
            "dropout": 0.2,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "keep_checkpoints": 1,
            "init_minimum": 4,
        }
        config = tiny_config(self.model, folder, **(settings | KINDS[self.kind]))
        if self.kind == "classifier":
            run.finetune(config, reviews(ROWS), reviews(5), callbacks=callbacks)
        else:
            run.finetune(config, sums(ROWS), sums(5), callbacks=callbacks)

    def finish(self, folder: Path) -> dict:
        """Starts the run again until it ends; its outcome."""
        status, error = forked(lambda: self.train(folder))
        return {"status": status, "error": error, **outcome(folder)}

    def fault(self, kind: str, value) -> dict:
        """One fault, the run after it, and the start after that."""
        folder = self.new_folder()

        def faulty() -> None:
            if kind in ("kill", "restart"):
                on_changes(lambda count: die() if count == value else None)
            act = {
                "memory": out_of_memory,
                "nan": not_a_number,
                "disk": lambda _: full_disk(2000),
            }
            self.train(folder, *([AtStep(value, act[kind])] if kind in act else []))

        if kind == "restart":  # the run has ended before the one that is killed starts
            self.finish(folder)
        seconds = value if kind == "time" else None
        status, error = forked(faulty, seconds)
        found = checkpoints(folder)
        for checkpoint in found:
            check(checkpoint, processes=1)
        hidden = sorted(path.name for path in folder.glob(".checkpoint*"))
        first = {"status": status, "error": error, "hidden": hidden}
        first["steps"] = [int(path.name[11:]) for path in found]
        return {"first": first, "second": self.finish(folder), "third": self.finish(folder)}

    def twice(self, seconds: float) -> dict:
        """Two starts in one folder, so many seconds apart, and one after them."""
        folder, processes = self.new_folder(), []
        for pause in (0, seconds):
            time.sleep(pause)
            processes.append(start(lambda: self.train(folder)))
        names = [child for child, _ in processes]
        ends = [ended(process) for process in processes]
        return {"processes": names, "ends": ends, "second": self.finish(folder)}

    def damaged(self, name: str) -> dict:
        """A bit of a file of the newest checkpoint flipped, and the run after it."""
        folder = self.new_folder()
        forked(lambda: self.train(folder, AtStep(SAVE_STEPS + 1, lambda _: die())))
        path = checkpoints(folder)[-1] / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        before = tree(folder)
        before.pop(LOCK)  # of the process that was killed
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
        """A run that nothing happens to, with its seconds and changes to files."""
        folder, counter = self.new_folder(), self.folder / f"{self.kind} changes"

        def counted() -> None:
            seen = on_changes(lambda count: None)
            self.train(folder)
            with counter.open("a") as file:
                file.write(f"{len(seen)}\n")

        began = time.perf_counter()
        status, error = forked(counted)
        seconds = time.perf_counter() - began
        assert status == 0, error
        state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
        forked(counted)
        changes, restart = map(int, counter.read_text().split())
        counts = {"kill": changes, "restart": restart, "time": seconds, "twice": seconds}
        return {"kind": self.kind, "epochs": state["epoch"], "counts": counts, **outcome(folder)}


def outcome(folder: Path) -> dict:
    """The losses of a run, the bits of what it has trained, and hidden files."""
    result = folder / "result.json"
    record = json.loads(result.read_text()) if result.exists() else {}
    trained = [path for name in ("adapter", "model") for path in (folder / name).glob("*.safe*")]
    return {
        "losses": record.get("losses"),
        "after": record.get("after"),
        "bits": {path.name: digest_of(read_tensors(path)[0]) for path in sorted(trained)},
        "checkpoints": [path.name for path in checkpoints(folder)],
        "remains": sorted(path.name for path in folder.rglob(".*")),
    }


def main() -> None:
    llama, bert, folder = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    known: dict[str, tuple[Runs, dict]] = {}
    for kind, fault, value in json.loads(sys.argv[4]):
        if kind not in known:
            runs = Runs(bert if kind == "classifier" else llama, folder, kind)
            known[kind] = runs, runs.whole()
            print(json.dumps(known[kind][1]), flush=True)
        runs, whole = known[kind]
        if fault in ("kill", "restart"):  # a share of the changes to files
            done = runs.fault(fault, max(1, round(value * whole["counts"][fault])))
        elif fault == "time":
            done = runs.fault(fault, value * whole["counts"]["time"])
        elif fault == "twice":
            done = runs.twice(value * whole["counts"]["time"])
        elif fault in ("damaged", "worker"):
            done = getattr(runs, fault)(value)
        else:
            done = runs.fault(fault, value)
        print(json.dumps({"fault": [kind, fault, value], **done}), flush=True)


if __name__ == "__main__":
    main()
