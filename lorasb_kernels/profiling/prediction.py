"""What the roofline predicts for a model on a GPU, without having that GPU.

A lower bound, not a forecast: datasheet bandwidth and rate, no launch overhead, every byte moved
once. Real devices take longer, also for frozen layers; ratios are more accurate than times.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lorasb_kernels.hardware.gpus import Gpu, find_gpu
from lorasb_kernels.ops.limits import MAX_RANK
from lorasb_kernels.profiling.costs import WAYS
from lorasb_kernels.profiling.results import Results, Row
from lorasb_kernels.profiling.roofline import Ceilings, datasheet_ceilings
from lorasb_kernels.profiling.shapes import PRESETS, SIBLINGS, TINY, Layer, Preset
from lorasb_kernels.utils.tables import markdown_table, seconds, size
from lorasb_kernels.utils.timing import median

# The launches that bound a contender of the results.
MEASURED_AS = {"frozen": "frozen", "published": "published", "lorasb triton": "two_call"}


@dataclass(frozen=True)
class Kind:
    """Layers of one shape in a model."""

    layer: Layer
    count: int


def model_kinds(model: str) -> list[Kind]:
    """The kinds of linear layers of a preset, or of the model in a folder or on the hub.

    Raises:
        ValueError: nothing to adapt.
        OSError: no such model.
    """
    preset = PRESETS.get(model) or (TINY if model == TINY.key else None)
    if preset is not None:
        return [Kind(layer, preset.blocks) for layer in preset.layers]
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorasb_kernels.targets import find_targets

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = Counter(
        Layer(name.rpartition(".")[2], linear.in_features, linear.out_features)
        for name, linear in find_targets(built, "all-linear").items()
    )
    return [Kind(layer, count) for layer, count in layers.items()]


def preset_of(model: str) -> Preset:
    """A preset, or the model in a folder or on the hub reduced to one.

    Raises:
        ValueError: nothing to adapt.
        OSError: no such model.
    """
    known = PRESETS.get(model) or (TINY if model == TINY.key else None)
    if known is not None:
        return known
    from transformers import AutoConfig

    groups: dict[object, list[Layer]] = {}
    for kind in model_kinds(model):
        siblings = next((names for names in SIBLINGS if kind.layer.name in names), kind.layer)
        groups.setdefault(siblings, []).append(kind.layer)
    config = AutoConfig.from_pretrained(model).get_text_config()
    return Preset(
        model,
        tuple(map(tuple, groups.values())),
        config.num_hidden_layers,
        config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def check_rank(layers: Iterable[Layer], r: int) -> None:
    """Raises ValueError for a rank that no kernel takes or a layer does not allow."""
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"rank is {r}; expected 1 <= rank <= {MAX_RANK}")
    for layer in layers:
        limit = min(layer.n, layer.m)
        if r > limit:
            raise ValueError(f"rank is {r}; expected 1 <= rank <= {limit} for {layer.name}")


def floor(layer: Layer, M: int, r: int, dtype: torch.dtype, ceilings: Ceilings, way: str) -> float:
    """Least seconds of forward and backward of a layer, computed in one of `costs.WAYS`."""
    launches = WAYS[way](M, layer.n, layer.m, r, dtype.itemsize)
    return ceilings.floor(launches.of("both"))


def predict(kinds: Sequence[Kind], M: int, r: int, dtype: torch.dtype, gpu: Gpu) -> str:
    """Markdown tables of predicted times and memory.

    Args:
        kinds: the layers.
        M: tokens.
        r: rank.
        dtype: of weights and activations.
        gpu: the GPU to predict for.

    Raises:
        ValueError: r is larger than a layer or the kernels allow.
    """
    check_rank((kind.layer for kind in kinds), r)
    name = str(dtype).removeprefix("torch.")
    ceilings = datasheet_ceilings(gpu, name)
    ways = ("frozen", "fused", "two_call", "published")
    rows, totals = [], dict.fromkeys(ways, 0.0)
    for kind in kinds:
        layer = kind.layer
        times = {way: floor(layer, M, r, dtype, ceilings, way) for way in ways}
        for way, value in times.items():
            totals[way] += kind.count * value
        rows.append((layer.name, f"{layer.m}x{layer.n}", str(kind.count), *_cells(times)))
    rows.append(("all", "", str(sum(kind.count for kind in kinds)), *_cells(totals)))
    header = ("layer", "shape", "count", "frozen", "fused", "two calls", "published")
    return "\n\n".join(
        [
            f"PREDICTION, not measured: {gpu.device_name}, {gpu.source}: "
            f"{gpu.bandwidth / 1e9:.0f} GB/s, {gpu.rate(name) / 1e12:.0f} TFLOP/s in {name}. "
            f"The least time of forward and backward at {M} tokens, r = {r}, for the frozen layer "
            "and what an adapter adds to it: fused into the frozen product, in two calls, and as "
            "published. Real times are longer.",
            markdown_table(header, rows),
            memory_table(kinds, M, r, dtype),
        ]
    )


def _cells(times: dict[str, float]) -> list[str]:
    bound = times["frozen"]
    others = [f"{value / bound - 1:+.1%}" for way, value in times.items() if way != "frozen"]
    return [seconds(bound), *others]


def memory_table(kinds: Sequence[Kind], M: int, r: int, dtype: torch.dtype) -> str:
    """The memory of the adapted layers: exact sizes, on any device."""
    e = dtype.itemsize
    count = sum(kind.count for kind in kinds)
    weights = sum(kind.count * kind.layer.n * kind.layer.m * e for kind in kinds)
    factors = sum(kind.count * r * (kind.layer.n + kind.layer.m) * e for kind in kinds)
    rows = [
        ("frozen weights", size(weights)),
        ("A and B", size(factors)),
        ("R, its gradient and Adam moments (fp32)", size(count * r * r * 16)),
        ("kept for backward (h)", size(count * M * r * e)),
    ]
    return markdown_table(("memory of the linear layers", "size"), rows)


def prediction_errors(results: Sequence[Results]) -> str:
    """The error of the prediction on every known GPU that has measurements."""
    rows = []
    for found in results:
        try:
            gpu = find_gpu(found.environment.gpu)
        except ValueError:
            continue
        for contender, way in MEASURED_AS.items():
            timed = found.select(contender=contender, quantity="time", quantile="p50")
            ratios = [ratio for row in timed if (ratio := _measured_over_floor(row, gpu, way))]
            if ratios:
                cells = (f"{median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
                rows.append((gpu.key, contender, str(len(ratios)), *cells))
    if not rows:
        return "Error of the prediction: unknown, no GPU has measurements yet."
    header = ("GPU", "contender", "cases", "measured / predicted", "least", "most")
    return markdown_table(header, rows)


def _measured_over_floor(row: Row, gpu: Gpu, way: str) -> float | None:
    """None for rows that are not forward and backward of a preset's layer or block."""
    key, _, name = row.shape.partition("/")
    if row.op not in ("linear.both", "block.both") or key not in PRESETS:
        return None
    wanted = name.split()[0]
    layers = [layer for layer in PRESETS[key].layers if wanted in ("block", layer.name)]
    ceilings = datasheet_ceilings(gpu, row.dtype)
    dtype = getattr(torch, row.dtype)
    least = sum(floor(layer, row.tokens, row.r, dtype, ceilings, way) for layer in layers)
    return row.value * 1e-6 / least


__all__ = ["Kind", "check_rank", "model_kinds", "predict", "prediction_errors", "preset_of"]
