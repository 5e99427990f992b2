"""An adapted layer, and a whole block of them, against the frozen layer and other libraries."""

from dataclasses import dataclass

import pytest
import torch

from bench.comparison import PASSES, Comparison
from bench.contenders import CONTENDERS
from bench.recording import Case
from lorasb_kernels.profiling.shapes import PRESETS, TINY, Layer, Preset
from lorasb_kernels.profiling.workload import Workload

TOKENS = (256, 512, 2048, 8192, 16384)
RANKS = (8, 24, 32, 64, 96, 128)
DTYPE = torch.bfloat16
# What LoRAFusion (arXiv:2510.00206) was timed on: these layers at r = 16 and 2048 to 8192 tokens.
SQUARE = {n: Preset(f"square-{n}", ((Layer("linear", n, n),),), 1, 0) for n in (4096, 5120, 8192)}
FIRST = ("frozen", "addmm", "lorasb triton", "lorasb triton, shared input")


@dataclass(frozen=True)
class LinearCase:
    """`layer` is the name of a layer, or `"block"` for all of a block."""

    preset: Preset
    layer: str
    M: int
    r: int

    @property
    def groups(self):
        if self.layer == "block":
            return self.preset.groups
        return [[layer] for layer in self.preset.layers if layer.name == self.layer]

    @property
    def shape(self) -> str:
        if self.layer == "block":
            return f"{self.preset.key}/block"
        layer = self.groups[0][0]
        return f"{self.preset.key}/{layer.name} {layer.m}x{layer.n}"

    def __str__(self) -> str:
        return f"{self.preset.key}-{self.layer}-M{self.M}-r{self.r}"


def distinct_layers(preset: Preset) -> list[str]:
    """One name for each shape of layer in a block."""
    return list({(layer.n, layer.m): layer.name for layer in reversed(preset.layers)}.values())


def cases(grid: str) -> dict[LinearCase, tuple[str, ...]]:
    """The cases of a grid and the passes of each."""
    if grid == "tiny":
        return {LinearCase(TINY, "block", 16, 8): PASSES}
    if grid == "full":
        return {
            LinearCase(preset, layer, M, r): PASSES
            for preset in PRESETS.values()
            for layer in ("block", *distinct_layers(preset))
            for M in TOKENS
            for r in RANKS
        }
    mistral = PRESETS["mistral-7b"]
    if grid == "first":
        return {
            LinearCase(mistral, "block", 512, 96): ("graph",),
            LinearCase(mistral, "block", 8192, 96): ("both",),
        }
    # First what was timed first, now with all contenders.
    found = {
        LinearCase(mistral, "block", 512, 96): ("graph", "both"),
        LinearCase(mistral, "block", 8192, 96): ("both",),
        LinearCase(mistral, "q_proj", 8192, 96): PASSES,
    }
    for preset in SQUARE.values():
        for M in (2048, 4096, 8192):
            found[LinearCase(preset, "linear", M, 16)] = ("both", "forward")
    for M in TOKENS:
        found.setdefault(LinearCase(mistral, "block", M, 96), ("both", "graph"))
    found[LinearCase(mistral, "block", 8192, 32)] = ("both",)
    for preset in PRESETS.values():
        found.setdefault(LinearCase(preset, "block", 8192, 96), ("both",))
    for r in RANKS:
        found.setdefault(LinearCase(mistral, "q_proj", 8192, r), ("both",))
    for M in TOKENS:
        found.setdefault(LinearCase(mistral, "q_proj", M, 96), ("both",))
    return found


def contends(name: str, case: LinearCase, grid: str) -> bool:
    """The first cases have four contenders. Compiling takes long: it runs on few cases."""
    if grid == "first":
        return name in FIRST
    if not CONTENDERS[name].compiles:
        return True
    first = case.M == 8192 and case.r == 96 and case.preset.key == "mistral-7b"
    return grid == "full" or (grid == "headline" and first)


def pytest_generate_tests(metafunc):
    grid = metafunc.config.getoption("--grid")
    parameters = [
        pytest.param(case, which, name, id=f"{case}-{which}-{name.replace(' ', '_')}")
        for case, passes in cases(grid).items()
        for which in passes
        for name in CONTENDERS
        if contends(name, case, grid)
    ]
    metafunc.parametrize(("case", "which", "contender"), parameters)


@pytest.fixture(scope="module")
def comparisons(device, timing, contenders_of):
    """The comparison of a case; the last one is kept."""
    current: dict[LinearCase, Comparison] = {}

    def comparison(case: LinearCase) -> Comparison:
        if case not in current:
            for old in current.values():
                old.close()
            current.clear()
            workload = Workload(case.groups, case.M, case.r, DTYPE, device, bias=case.preset.bias)
            names = contenders_of(case)
            names = [name for name in names if CONTENDERS[name].obstacle(device, DTYPE) is None]
            current[case] = Comparison(workload, names, timing)
        return current[case]

    yield comparison
    for last in current.values():
        last.close()


def test_linear(case, which, contender, comparisons, device, record):
    if which == "graph" and device.type != "cuda":
        pytest.skip("needs a CUDA device")
    obstacle = CONTENDERS[contender].obstacle(device, DTYPE)
    if obstacle:
        pytest.skip(obstacle)
    try:
        measured = comparisons(case).measurement(which, contender)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")
    op = f"{'block' if case.layer == 'block' else 'linear'}.{which}"
    record(
        Case(op, case.shape, case.M, case.r, str(DTYPE).removeprefix("torch.")), contender, measured
    )
