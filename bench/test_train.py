"""A training step of the papers' models: tokens per second and peak memory."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from bench.models import METHODS, Method, blocks_that_fit, random_model, twin
from bench.recording import Case, Measurement
from lorasb_kernels.profiling.shapes import PRESETS
from lorasb_kernels.utils.timing import interleave, median, peak_bytes

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class TrainCase:
    """One micro-batch of `batch` × `length` tokens through a preset at rank r.

    `full`: with full fine-tuning among the contenders, and only as many blocks as it has room for.
    """

    key: str
    batch: int
    length: int
    r: int
    checkpointing: bool
    full: bool = False

    def __str__(self) -> str:
        return f"{self.key}-{self.batch}x{self.length}-r{self.r}{'-full' if self.full else ''}"

    @property
    def methods(self) -> list[str]:
        """The contenders."""
        return [name for name, method in METHODS.items() if self.full or not method.full]


def cases(grid: str) -> list[TrainCase]:
    """The cases of a grid."""
    if grid == "tiny":
        return [TrainCase("tiny", 2, 16, 8, True, full=True)]
    # 16 k tokens: users report LoRA on all linear layers slower there than full fine-tuning.
    long = TrainCase("llama-3.2-3b", 4, 4096, 96, True, full=True)
    return [long, *(TrainCase(key, 8, 512, 96, key != "roberta-large") for key in PRESETS)]


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(case, name, id=f"{case}-{name.replace(' ', '_')}")
        for case in cases(metafunc.config.getoption("--grid"))
        for name in case.methods
    ]
    metafunc.parametrize(("case", "contender"), parameters)


def training_step(model, method: Method, case: TrainCase, device: torch.device):
    """A call that runs one forward, backward and optimizer step."""
    model = method.adapt(model, case.r)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (case.batch, case.length), generator=generator).to(device)
    labels = ids if case.key != "roberta-large" else torch.zeros_like(ids[:, 0])

    def step(_: int) -> None:
        precision = torch.autocast(device.type, DTYPE) if method.autocast else None
        with precision or contextlib.nullcontext():
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure(case: TrainCase, names, device, timing):
    """Every method on the same weights, in turns; for one that failed, its exception."""
    layers = blocks_that_fit(case.key, device, DTYPE, case.full)
    weights = random_model(case.key, device, DTYPE, layers)
    found, steps = {}, {}
    for name in names:
        try:
            step = training_step(twin(weights), METHODS[name], case, device)
            step(0)
            steps[name] = step
        except Exception as failure:
            found[name] = failure
    samples = interleave(steps, device, **{**timing, "rounds": min(5, timing["rounds"])})
    held = sum(tensor.nbytes for tensor in weights.parameters())
    for name, step in steps.items():
        speed = case.batch * case.length / median(samples[name])
        others = [
            ("throughput", speed, "tokens/s"),
            ("blocks", weights.config.num_hidden_layers, "1"),
            ("weights", held, "bytes"),
        ]
        found[name] = Measurement(samples[name], peak=peak_bytes(step, device), others=others)
    return found


@pytest.fixture(scope="module")
def measurements(device, timing, contenders_of):
    """What all selected methods took on a case; only the last case is kept."""
    known = {}

    def of(case: TrainCase):
        if case not in known:
            known.clear()
            names = [name for name in contenders_of(case) if not METHODS[name].obstacle(device)]
            known[case] = measure(case, names, device, timing)
        return known[case]

    return of


def test_train(case, contender, device, measurements, record):
    obstacle = METHODS[contender].obstacle(device)
    if obstacle:
        pytest.skip(obstacle)
    measured = measurements(case)[contender]
    if isinstance(measured, torch.OutOfMemoryError):
        pytest.skip(f"out of memory: {measured}")
    if isinstance(measured, Exception):
        raise measured
    shape = f"{case.key} {case.batch}x{case.length}{', room for full' if case.full else ''}"
    tokens = case.batch * case.length
    record(Case("train.step", shape, tokens, case.r, "bfloat16"), contender, measured)
