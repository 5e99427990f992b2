"""Saves killed at each of their changes to files, in forks of a process that imported all once.

    python -m tests.io.interrupted_saves FOLDER

prints for each kind of save a line of JSON: what loading gave after the kill at each change
("old", "new", or the error), and after saving again.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from lorasb_kernels import LoRASBConfig, adapt, load_adapter, save_adapter
from tests.trust.hostile_files import Layers
from tests.trust.killed_runs import die, forked, on_changes

FORMAT_1 = Path(__file__).parent / "format_1" / "orthogonal"
X = torch.linspace(-1, 1, 12).view(2, 6)


def adapter(shift: float = 0.0, **settings) -> torch.nn.Module:
    config = {"r": 2, "target_modules": ("0", "1"), "init": "orthogonal", "lora_alpha": 16}
    model = adapt(Layers(), LoRASBConfig(**config | settings), progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                start = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
                parameter.copy_(start + shift)
    return model


def loaded(folder: Path, known: dict[str, torch.Tensor]) -> str:
    """Whose outputs the adapter in `folder` has, or why it does not load."""
    try:
        outputs = load_adapter(Layers(), folder)(X)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return next((name for name, own in known.items() if torch.equal(own, outputs)), "neither")


def killed_save(model: torch.nn.Module, folder: Path, change: int) -> None:
    """Saves, but dies just before its `change`-th change to a file."""
    on_changes(lambda count: die() if count == change else None)
    save_adapter(model, folder)


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    pairs = {
        "steps": (adapter(), adapter(0.5)),
        "lora_alpha": (adapter(), adapter(lora_alpha=18)),
        "seed": (adapter(), adapter(seed=1)),
        "first": (None, adapter()),
        "format 1": (FORMAT_1, adapter()),
    }
    for kind, (old, new) in pairs.items():
        start, folder = root / f"{kind} old", root / kind
        known = {"new": new(X)}
        if isinstance(old, Path):
            shutil.copytree(old, start)
            known["old"] = load_adapter(Layers(), start)(X)
        elif old is not None:
            save_adapter(old, start)
            known["old"] = old(X)
        outcomes, again = [], []
        killed = True
        while killed:
            shutil.rmtree(folder, ignore_errors=True)
            if old is not None:
                shutil.copytree(start, folder)

            killed = forked(partial(killed_save, new, folder, len(outcomes) + 1))[0] != 0
            outcomes.append(loaded(folder, known))
            save_adapter(new, folder)
            again.append(loaded(folder, known))
        print(json.dumps({"kind": kind, "outcomes": outcomes, "again": again}), flush=True)


if __name__ == "__main__":
    main()
