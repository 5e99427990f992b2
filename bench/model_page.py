"""Writes docs/performance_model.md: the model's rates, its error, and what it predicts.

python -m bench.model_page
"""

from pathlib import Path

import torch

from bench.published import comparisons, sources, summary
from lorasb_kernels.hardware.gpus import GPUS, OF_ARCHITECTURE
from lorasb_kernels.ops.triton.route_rule import MARGIN, unmeasured_route
from lorasb_kernels.profiling.block_time import ATTENTION_SHARE
from lorasb_kernels.profiling.model_tables import (
    LIMITS_TEXT,
    MULTIPLES_TEXT,
    limits_table,
    multiples_table,
    rates_table,
    training_table,
)
from lorasb_kernels.profiling.shapes import PRESETS
from lorasb_kernels.utils.files import write_text
from lorasb_kernels.utils.tables import markdown_table

PATH = Path(__file__).resolve().parents[1] / "docs" / "performance_model.md"
SHOWN = ("a6000", "a100", "h100", "rtx4090", "rtx5090")
HEAD = """# A performance model to argue with

**Everything on this page is a prediction. Nothing in it was measured by this library.** Written
by `python -m bench.model_page`. The same for any model, rank and number of tokens, with every tile:

    lorasb profile --model mistral-7b --rank 96 --tokens 8192 --gpu a6000 --tiles

A time is built from three things, each of which can be looked up and disputed:

1. **What a kernel asks for**, counted from its compiled code: flops of the tensor-core
   instructions, issue slots, bytes to and from shared memory, for each loop of a block
   (`lorasb_kernels/hardware/sass_counts.json`, written by
   `python -m bench.kernel_resources.counts`; bf16, without dropout). Bytes of L2 and device memory
   follow from tiles and shapes. The vendor's GEMM is the best of usual tiles with ideal
   instructions (`hardware/gemm.py`).
2. **What a device sustains**: the rates below, each with its source.
3. **How the two combine** (`hardware/limits.py`): the longest of five throughputs, plus whole
   numbers of blocks (waves), plus latencies that nothing covers, plus the gap between launches.

The roofline of [a6000.md](a6000.md) stays what it is: a bound that no kernel can pass.
"""
LIMITS_HEAD = """## Limits of each kernel and tile

q_proj of Mistral-7B (4096×4096), bf16, r = 96, every tile of the fused kernels. In a tile, `8w4s`
is 8 warps and 4 stages; `fused TMA` is `fused_descriptor`. `dual` is a persistent GEMM with two
pairs of operands, taken as 1 % slower than the vendor's GEMM of the same size, not a kernel that
was counted.
"""
RULE_TEXT = f"""## The rule for shapes that nothing has measured

`ops/triton/route_rule.py`: the fused kernel that the model predicts to be the fastest, where it is
predicted to be {MARGIN:.0%} faster than the two calls; else the two calls. M counts as the next
power of two and r as its tiles. For r = 16, forward:
"""
FIT_TEXT = """## On a GPU

`lorasb profile --model mistral-7b` measures each kernel in a CUDA graph, prints the model's error
on each, fits the six rates to the measurements (least squares on the logarithm of time; a rate on
which nothing measured depends keeps its published value) and prints the errors that remain. The
tests recover known rates from times that they make.

With `pip install lorasb_kernels[heuristics]`, NVIDIA's own estimate of the GEMMs
(`nvidia-matmul-heuristics`) stands beside the model's in what `lorasb profile --gpu` prints.
"""


def page() -> str:
    """The whole page."""
    mistral = PRESETS["mistral-7b"]
    parts = [HEAD, "## Rates\n", *_sourced_rates(), "## Error on published GEMMs\n", *_errors()]
    parts += [LIMITS_HEAD, LIMITS_TEXT]
    for key, M in (("a6000", 512), ("a6000", 8192), ("h100", 512), ("h100", 8192)):
        parts += [
            f"### {key}, {M} tokens\n",
            limits_table(GPUS[key], mistral.layers[0], M, 96, True),
        ]
    parts += ["## A block's multiple over the frozen block\n", MULTIPLES_TEXT, "### Mistral-7B\n"]
    parts += [multiples_table(GPUS[key], mistral.groups, r) for key in SHOWN for r in (16, 96)]
    for name in ("llama-3.2-3b", "roberta-large"):
        parts.append(f"### {name}\n")
        parts += [multiples_table(GPUS[key], PRESETS[name].groups, 96) for key in ("a6000", "h100")]
    parts += [RULE_TEXT, _rule_table(), *_training(), FIT_TEXT]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _sourced_rates() -> list[str]:
    text = """`gemm`: github.com/mag-/gpu_benchmark at 93322b7, the best bf16 `torch.matmul` of a
search over shapes. `bench`: github.com/te42kyfo/gpu-benches at 1c36d50: gpu-stream (triad),
gpu-l2-cache, gpu-cache, gpu-latency, gpu-small-kernels. Datasheet numbers: `hardware/gpus.py`."""
    return [text, *(rates_table(GPUS[key]) for key in SHOWN)]


def _errors() -> list[str]:
    found = comparisons()
    square = [c for c in found if min(c.sizes) >= 512]
    skinny = [c for c in found if min(c.sizes) < 512]
    (middle, worst), (thin, thinnest) = summary(square), summary(skinny)
    rows = [
        (
            f"{c.table} {'×'.join(map(str, c.sizes))}",
            f"{1e6 * c.published:.1f}",
            f"{1e6 * c.predicted:.1f}",
            f"{c.error:+.0%}",
        )
        for c in found
    ]
    return [
        f"""Times that others published, recomputed from rates of other sources
(`bench/published.py`). Of {len(square)} GEMMs with no side below 512 the median size of the error
is {middle:.1%}, the largest {worst:.0%}; of {len(skinny)} with a side of 16 or 64, {thin:.0%} and
{thinnest:.0%}: there Triton's kernel could split the contraction, as this library's does not.

This is no blind test: that a warp executes what it runs once at 4 clocks an instruction, and that
a step of a Triton loop stalls for 100 clocks, was added after a first look at these tables, with
values from the sources named in the code. No rate was fitted.""",
        markdown_table(("GEMM, M×N×K", "published µs", "predicted µs", "error"), rows),
        "\n".join(f"* {name}: {source}" for name, source in sources()),
    ]


def _rule_table() -> str:
    rows = []
    for arch, key in OF_ARCHITECTURE.items():
        for K in (576, 1024, 4096, 14336):
            cells = []
            for M in (256, 1024, 8192):
                rule = unmeasured_route(arch, torch.bfloat16, M, 4096, K, 16, False, False)
                cells.append("two calls" if rule.name == "two_call" else rule.name)
            rows.append((f"{arch} ({key}), N = 4096, K = {K}", *cells))
    return markdown_table(("shape", "M = 256", "M = 1024", "M = 8192"), rows)


def _training() -> list[str]:
    text = f"""## A training step

Tokens per second of a training step with all linear layers adapted, by the rule's routes, in
micro-batches of 8192 tokens, without and with gradient checkpointing
(`profiling/block_time.py`: `training_tokens_per_second`). Besides the linear layers it counts the
head over the vocabulary, attention at {ATTENTION_SHARE:.0%} of the tensor cores' sustained rate
(assumed), and the passes of norms, activations and residuals over device memory (assumed to be 36
times the hidden and 9 times the intermediate activations a block); no optimizer, no host."""
    return [
        text,
        training_table(list(PRESETS.values()), [GPUS[key] for key in SHOWN], 8192, 96, 512),
    ]


if __name__ == "__main__":
    write_text(PATH, page())
