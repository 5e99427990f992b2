"""One contender of `bench.init_cost` in its own process: prints its time and memory.

    python -m bench.init_process resident --layers 30 --samples 32

Time is the processor time of one thread, which other processes disturb least; memory is the peak
of the resident set beyond what the process held before (VmHWM, reset through
/proc/self/clear_refs).
"""

import argparse
import json
import time

import torch
from torch import nn

from bench.contenders_init import CONTENDERS, Factors
from lorasb_kernels.init import truncated_svd
from lorasb_kernels.profiling.memory_peak import peak_since_reset, reset_peak
from lorasb_kernels.targets import find_targets
from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.demo import assets, headlines
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.samples import Example

QUESTION = "Is this headline sarcastic? Answer yes or no.\n{}"
ANSWERS = ("no", "yes")


def load(layers: int, dtype: torch.dtype) -> nn.Module:
    """The first `layers` blocks of SmolLM2-135M-Instruct with its head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    for parameter in model.parameters():
        # The file is memory-mapped: its pages would be counted for the code that reads them first.
        parameter.data = parameter.data.clone()
    return model


def headline_batches(samples: int, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """Training headlines as questions with a yes or no, longest first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    rows = headlines.load().train[:samples]
    examples = [Example(QUESTION.format(row.text), ANSWERS[row.label]) for row in rows]
    encoded = Encoder(tokenizer, max_length=256).examples(examples)
    encoded.sort(key=lambda sample: -len(sample.input_ids))
    collate = Collator(tokenizer.pad_token_id)
    return [collate(encoded[i : i + micro_batch]) for i in range(0, samples, micro_batch)]


def captured_energy(factors: Factors) -> float | None:
    """Mean share of ‖ΔW‖² in the factors; every element of ΔW counts as ±η (zeros are rare)."""
    shares = [
        float(S.double().square().sum()) / (1e-8 * U.shape[0] * V.shape[0])
        for U, S, V in factors.values()
    ]
    return sum(shares) / len(shares) if shares else None


def measure(
    contender: str, layers: int, samples: int, micro_batch: int, r: int, dtype: str
) -> dict:
    """Runs `contender` and returns its seconds, bytes and captured energy."""
    torch.set_num_threads(1)
    model = load(layers, getattr(torch, dtype))
    batches = headline_batches(samples, micro_batch)
    targets = list(find_targets(model, "all-linear"))
    blocks = len(model.model.layers)
    weights = [model.get_submodule(name).weight for name in targets]
    accumulators = sum(4 * weight.numel() for weight in weights)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    boundaries = tokens * model.config.hidden_size * weights[0].element_size() * blocks
    with torch.no_grad():  # loads the code and buffers of the math libraries, which are not counted
        model(**{key: value[:1] for key, value in batches[-1].items()})
        truncated_svd(torch.randn(model.config.hidden_size, model.config.hidden_size), r)
    held = reset_peak()
    start = time.process_time()
    factors = CONTENDERS[contender](model, batches, targets, r, 1e-4)
    seconds = time.process_time() - start
    return {
        "contender": contender,
        "layers": layers,
        "samples": samples,
        "micro_batch": micro_batch,
        "tokens": tokens,
        "r": r,
        "dtype": dtype,
        "seconds": seconds,
        "peak_bytes": peak_since_reset() - held,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "all_accumulators_bytes": accumulators,
        "block_accumulators_bytes": accumulators // blocks,
        "boundaries_bytes": boundaries,
        "captured_energy": captured_energy(factors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    result = measure(
        arguments.contender,
        arguments.layers,
        arguments.samples,
        arguments.micro_batch,
        arguments.rank,
        arguments.dtype,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
