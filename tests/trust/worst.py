"""The worst verdict of each operation over drawn cases, in one dtype on one backend.

    python -m tests.trust.worst bfloat16 triton shrink expand --cases 20 --emulated

prints a line of JSON for each. With `--emulated` the Triton kernels run as PTX for sm_86 on
the CPU, which needs a process without Triton's interpreter.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import strategies as st


@dataclass
class Worst:
    """Worst ratios to the allowed error over `cases`; `fault`: an error beyond any tolerance."""

    cases: int = 0
    contract: float = 0.0
    elements: float = 0.0
    fault: str | None = None

    def add(self, verdicts) -> None:
        self.cases += 1
        for verdict in verdicts:
            self.contract = max(self.contract, verdict.contract)
            self.elements = max(self.elements, verdict.elements)
            self.fault = self.fault or verdict.fault


def worst_of(
    operator: str, dtype: torch.dtype, backend: str, device: torch.device, cases: int
) -> Worst:
    """Draws `cases` cases, steered to where the ratio grows; always the same ones."""
    from tests.trust.operators import OPERATORS, Case

    attempt, worst = OPERATORS[operator], Worst()

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.target],
    )
    @given(st.data())
    def draw(data):
        verdicts = attempt(Case(data.draw, dtype, device), backend)
        worst.add(verdicts)
        target(min(max(verdict.ratio for verdict in verdicts), 1e6))

    draw()
    return worst


@contextlib.contextmanager
def poisoned_memory():
    """`torch.empty` returns NaN, so an element that a kernel does not write is detected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def emulation():
    """Inside this context `backend="triton"` runs emulated PTX on CPU tensors."""
    from lorasb_kernels.ops import dispatch as backend
    from tests.aot.emulator import emulated

    own = backend._gpu_obstacle
    backend._gpu_obstacle = lambda device: None  # CPU tensors are accepted
    try:
        with emulated(check_races=False, check_uninit=False, check_overlap=False):
            yield
    finally:
        backend._gpu_obstacle = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype")
    parser.add_argument("backend")
    parser.add_argument("operators", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = str(int(options.device == "cpu" and not options.emulated))
    torch.set_num_threads(1)
    arguments = (getattr(torch, options.dtype), options.backend, torch.device(options.device))
    with poisoned_memory(), emulation() if options.emulated else contextlib.nullcontext():
        for operator in options.operators:
            worst = worst_of(operator, *arguments, options.cases)
            print(json.dumps({"operator": operator, **dataclasses.asdict(worst)}), flush=True)


if __name__ == "__main__":
    main()
