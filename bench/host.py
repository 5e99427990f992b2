"""What an adapter costs the host: a tiny layer, and a training step of a small model, on one core.

    python -m bench.host --output-dir bench/results

The layer has so few elements that nothing but the host's own work is left: Python, torch's
dispatcher, autograd. That is what a GPU waits for when its kernels are short. The step is one of
SmolLM2-135M's architecture with random weights, forward, backward and AdamW, where an adapter pays
for its products as well. Contenders take turns burst by burst; a time is the median processor time
of this process, which other processes disturb least, and a multiple the median over rounds, as the
times of a round share their disturbance. Writes host.json and prints the tables; `--part` measures
some parts anew and leaves the others as they were.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.contenders import CONTENDERS
from bench.environment import environment
from bench.models import METHODS, random_model, twin
from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.profiling.workload import Operands
from lorasb_kernels.targets import find_targets
from lorasb_kernels.utils.files import write_text
from lorasb_kernels.utils.tables import markdown_table

LAYER = {"nn.Linear": "frozen", "published": "published", "peft LoRA": "peft", "addmm": "addmm"}
LAYER |= {"LoRASBLinear": "lorasb reference", "LoRALinear": "lorasb reference, LoRA"}
FEATURES, RANK, ROWS = 8, 2, 2  # of the tiny layer
STEPS = {"1 × 16": (1, 16), "4 × 64": (4, 64), "8 × 128": (8, 128)}  # samples × tokens
STEP_RANK = 16


def processor_times(
    calls: Mapping[str, Callable[[], object]], rounds: int, burst: int
) -> dict[str, list[float]]:
    """Processor seconds per call by name, one number for each round; a burst of each in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call = calls[name]
            begin = time.process_time()
            for _ in range(burst):
                call()
            samples[name].append((time.process_time() - begin) / burst)
    return samples


def tiny_layers() -> dict[str, nn.Module]:
    """One layer of each contender over the same operands, in fp32."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    operands = Operands(
        weight=draw(FEATURES, FEATURES),
        bias=draw(FEATURES),
        lora_A=draw(RANK, FEATURES),
        lora_R=draw(RANK, RANK),
        lora_B=draw(FEATURES, RANK),
        scaling=1.0,
    )
    return {name: CONTENDERS[key].build([operands])[0] for name, key in LAYER.items()}


def passes() -> dict[str, Callable[[nn.Module], None]]:
    """Forward without gradients, forward, and forward and backward, of a layer."""
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.ones(ROWS, FEATURES)

    def without_gradients(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward, no grad": without_gradients,
        "forward": lambda layer: layer(x),
        "forward + backward": lambda layer: layer(x).backward(dy),
    }


def measure_layer(rounds: int, burst: int) -> list[dict]:
    """Microseconds of every contender in every pass."""
    layers, rows = tiny_layers(), []
    for name, run in passes().items():
        calls = {contender: partial(run, layer) for contender, layer in layers.items()}
        for contender, samples in processor_times(calls, rounds, burst).items():
            rows.append({"contender": contender, "pass": name, **microseconds(samples)})
    return rows


def microseconds(samples: list[float]) -> dict:
    """Median, least and all of some times in seconds, in microseconds."""
    samples = [round(1e6 * sample, 3) for sample in samples]
    return {"median": statistics.median(samples), "least": min(samples), "samples": samples}


def _full(model: nn.Module, r: int) -> nn.Module:
    return model.requires_grad_(True)


def _peft(model: nn.Module, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.rpartition(".")[2] for name in find_targets(model, "all-linear")})
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets))


def _lora(model: nn.Module, r: int) -> nn.Module:
    return adapt(model, LoRASBConfig(r, init="lora"), progress=False)


TRAINED: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "frozen": METHODS["frozen"].adapt,
    "full fine-tuning": _full,
    "published": METHODS["published"].adapt,
    "peft LoRA": _peft,
    "LoRA-SB, this library": METHODS["lorasb auto"].adapt,
    "LoRA, this library": _lora,
}


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A call that runs forward, backward and, if anything is trained, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_step(size: str, rounds: int) -> list[dict]:
    """Microseconds of a step of every contender on a micro-batch of `STEPS[size]`."""
    generator = torch.Generator().manual_seed(0)
    weights = random_model("smollm2-135m", torch.device("cpu"), torch.float32)
    ids = torch.randint(3, weights.config.vocab_size, STEPS[size], generator=generator)
    steps = {}
    for name, change in TRAINED.items():
        # Full fine-tuning changes its weights, so they are its own.
        model = copy.deepcopy(weights) if name == "full fine-tuning" else twin(weights)
        steps[name] = training_step(change(model, STEP_RANK).train(), ids)
    return [
        {"contender": name, "tokens": size, **microseconds(samples)}
        for name, samples in processor_times(steps, rounds, 1).items()
    ]


def tables(record: dict) -> str:
    """Markdown of what host.json holds."""
    step = [row for size in STEPS for row in record.get(size, [])]
    parts = []
    if "layer" in record:
        parts += [
            f"A layer of {FEATURES} × {FEATURES} at rank {RANK} on {ROWS} rows, µs per call:",
            _table(record["layer"], "pass", 1.0),
        ]
    if step:
        parts += [
            f"A step of SmolLM2-135M's architecture, r = {STEP_RANK}, fp32, ms (samples × tokens):",
            _table(step, "tokens", 1e-3),
        ]
    return "\n\n".join(parts)


def _table(rows: list[dict], column: str, unit: float) -> str:
    """By contender and `column` the median, and the median over rounds of its multiple of the
    first contender's time in the same round."""
    columns = list(dict.fromkeys(row[column] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    found = {(row["contender"], row[column]): row for row in rows}
    lines = []
    for name in contenders:
        cells = []
        for value in columns:
            own, bound = found[name, value], found[contenders[0], value]
            pairs = zip(own["samples"], bound["samples"], strict=True)
            over = statistics.median(mine / first for mine, first in pairs)
            multiple = f" ({over:.2f}×)" if name != contenders[0] else ""
            cells.append(f"{own['median'] * unit:.1f}{multiple}")
        lines.append([name, *cells])
    return markdown_table(["", *columns], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("bench/results"))
    parser.add_argument("--part", choices=["layer", *STEPS], nargs="*", default=["layer", *STEPS])
    parser.add_argument("--rounds", type=int, default=30, help="bursts of the tiny layer")
    parser.add_argument("--burst", type=int, default=300, help="calls of the tiny layer per burst")
    parser.add_argument("--step-rounds", type=int, default=5, help="steps of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output_dir / "host.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.part:
        if part == "layer":
            record[part] = measure_layer(arguments.rounds, arguments.burst)
        else:
            record[part] = measure_step(part, arguments.step_rounds)
        record["environment"] = asdict(environment(torch.device("cpu")))
        write_text(path, json.dumps(record, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    main()
