"""Which training samples LoRA-SB's first update is estimated from, and how many."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from lorasb_kernels.init.estimation.noise_scale import NoiseScale, noise_scale
from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.encoding import Encoded

AGREEMENT = 0.9  # cosine between the estimated and the exact gradient that is enough
PILOT = 32  # samples that the noise is measured on
PILOT_BATCH = 4  # several small batches tell more about the noise than a large one
LIMIT = 0.1  # of the samples that training sees: what the estimate may cost


def fixed_count(config: TrainConfig, available: int) -> int:
    """`init_share` of the samples, but at least `init_minimum`."""
    return min(available, max(config.init_minimum, round(config.init_share * available)))


def largest_count(config: TrainConfig, available: int) -> int:
    """The most samples that `init_samples: auto` takes."""
    per_step = config.batch_size * config.accumulation * _ranks()
    seen = config.max_steps * per_step if config.max_steps else config.epochs * available
    return min(available, max(config.init_minimum, int(LIMIT * seen)))


def measured_count(
    model: nn.Module,
    config: TrainConfig,
    samples: Sequence[Encoded],
    pad_token_id: int,
    targets: Iterable[str],
) -> tuple[int, str]:
    """So many samples that the estimate agrees with the exact gradient to `AGREEMENT`, within the
    limit; and the finding in words.

    The noise scale of the gradients is measured on `PILOT` of the samples or a few more.
    """
    limit = largest_count(config, len(samples))
    pilot = max(PILOT, 2 * PILOT_BATCH * _ranks())  # two batches at least on every rank
    if limit <= pilot:
        return limit, f"update estimated from {limit} of {len(samples)} samples"
    device = next(model.parameters()).device
    drawn = [samples[i] for i in _drawn(config, len(samples))[:pilot]]
    batches = _collated(drawn, PILOT_BATCH, pad_token_id, device)
    sizes = [len(batch["input_ids"]) for batch in batches]
    scale = noise_scale(model, batches, sizes, targets)
    needed = scale.samples(AGREEMENT)
    count = limit if needed > limit else max(config.init_minimum, math.ceil(needed))
    return count, _finding(count, len(samples), limit, scale)


def _finding(count: int, available: int, limit: int, scale: NoiseScale) -> str:
    start = f"update estimated from {count} of {available} samples"
    if math.isinf(scale.median):
        return (
            f"{start}, the limit: in a few samples the gradients of most layers show no common "
            "direction, so more samples would help"
        )
    reached = f"cosine to the exact gradient about {scale.agreement(count):.2f}"
    measured = f"gradient noise scale {scale.median:.3g} samples, median of the layers"
    if count < limit:
        return f"{start}: {reached} ({measured})"
    wanted = f"{AGREEMENT} would take {math.ceil(scale.samples(AGREEMENT))}"
    return f"{start}, the limit: {reached}; {wanted} ({measured})"


def start_batches(
    config: TrainConfig,
    samples: Sequence[Encoded],
    pad_token_id: int,
    device: torch.device,
    count: int,
) -> Iterable[dict[str, torch.Tensor]]:
    """The batches that estimate the first update from `count` samples.

    The samples are drawn with the run's seed and sorted by length. The batches are distributed
    over data-parallel ranks if there are enough; the estimate sums over the ranks.
    """
    drawn = [samples[i] for i in _drawn(config, len(samples))[:count]]
    return _collated(drawn, config.init_batch_size or config.batch_size, pad_token_id, device)


def _drawn(config: TrainConfig, available: int) -> list[int]:
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(available, generator=generator).tolist()


def _collated(
    samples: Sequence[Encoded], size: int, pad_token_id: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    ordered = sorted(samples, key=lambda sample: -len(sample.input_ids))
    batches = [
        {name: tensor.to(device) for name, tensor in batch.items()}
        for batch in DataLoader(ordered, size, collate_fn=Collator(pad_token_id))
    ]
    ranks = _ranks()
    if ranks > 1 and len(batches) >= ranks:
        return batches[torch.distributed.get_rank() :: ranks]
    return batches


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
