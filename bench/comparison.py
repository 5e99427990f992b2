"""Contenders on one workload, timed against each other, one pass at a time."""

from collections.abc import Iterable

import torch

from bench.contenders import CONTENDERS
from bench.recording import Measurement
from lorasb_kernels.profiling.workload import Build, Run, Workload
from lorasb_kernels.utils.timing import captured, interleave, peak_bytes

PASSES = ("forward", "backward", "both", "graph")  # graph: both, in a CUDA graph


class TimedRun(Run):
    """A run of which backward can be timed alone."""

    def __init__(self, build: Build, workload: Workload):
        super().__init__(build, workload)
        self._outputs: dict[int, list[torch.Tensor]] = {}

    def backward(self, i: int) -> tuple[torch.Tensor, ...]:
        """Only backward, over a graph that is built at the first call and kept."""
        i %= len(self.copies)
        if i not in self._outputs:
            self._outputs[i] = self.forward(i)
        dys = self.copies[i].dys
        return torch.autograd.grad(self._outputs[i], self.leaves(i), dys, retain_graph=True)

    def release(self) -> None:
        """Drops the kept graphs."""
        self._outputs.clear()


class Comparison:
    """Builds each contender on `workload` once; one that fails to build does not affect the others.

    Args:
        workload: the operands.
        names: keys of `CONTENDERS` that can run on the workload's device.
        timing: keyword arguments of `timing.interleave`.
    """

    def __init__(self, workload: Workload, names: Iterable[str], timing: dict):
        self.workload, self.timing = workload, timing
        self.runs: dict[str, TimedRun] = {}
        self.failures: dict[str, Exception] = {}
        self._measured: dict[str, dict[str, Measurement]] = {}
        for name in names:
            try:
                run = TimedRun(CONTENDERS[name].build, workload)
                run.both(0)
                self.runs[name] = run
            except Exception as failure:
                self.failures[name] = failure

    def measurement(self, which: str, contender: str) -> Measurement:
        """What `contender` took for the pass `which`; all contenders are timed at the first call.

        Raises:
            Exception: what the contender raised when it was built or first run.
        """
        if which not in self._measured:
            self._measured[which] = self._measure(which)
        if contender in self.failures:
            raise self.failures[contender]
        return self._measured[which][contender]

    def _measure(self, which: str) -> dict[str, Measurement]:
        device = self.workload.device
        copies = len(self.workload.copies)
        eager = "both" if which == "graph" else which
        calls = {}
        for name, run in list(self.runs.items()):
            try:
                call = getattr(run, eager)
                calls[name] = captured(call, copies, device) if which == "graph" else call
                calls[name](0)
            except Exception as failure:
                self.failures[name] = failure
                del self.runs[name]
                calls.pop(name, None)
        samples = interleave(calls, device, **self.timing)
        found = {}
        for name in calls:
            run, contender = self.runs[name], CONTENDERS[name]
            found[name] = Measurement(
                samples=samples[name],
                launches=self.workload.launches(contender.way or "two_call", eager),
                peak=None if which == "graph" else peak_bytes(getattr(run, eager), device),
                saved=run.saved_bytes() if which == "both" and not contender.compiles else None,
            )
            run.release()
        return found

    def close(self) -> None:
        """Frees all device memory, and compiled code, of which torch keeps a limited number."""
        if any(CONTENDERS[name].compiles for name in self.runs):
            torch.compiler.reset()
        self.runs.clear()
        self._measured.clear()
        if self.workload.device.type == "cuda":
            torch.cuda.empty_cache()


__all__ = ["PASSES", "Comparison", "TimedRun"]
