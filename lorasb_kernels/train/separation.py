"""Checks once, before training, that the model keeps the samples of a batch apart.

Packing requires that the model sees a boundary where `position_ids` restart; padding requires that
it respects the attention mask. Some models do neither: attention with relative positions (OPT,
Falcon, BLOOM, MPT) or a recurrent state (Qwen3-Next, LFM2, RecurrentGemma) runs on from one sample
into the next, without an error. So two samples of the training set go through the model in one
batch and alone.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lorasb_kernels.train.batching import Collator, pack
from lorasb_kernels.train.encoding import Encoded
from lorasb_kernels.train.errors import ConfigError

LENGTHS = (32, 24)  # tokens of the two samples, at most: enough for every layer to mix them


@torch.no_grad()
def check_separation(
    model: nn.Module, samples: Sequence[Encoded], pad_token_id: int, packed: bool
) -> None:
    """Compares the logits of a packed or padded pair of samples with those of each alone.

    They may differ by the square root of the dtype's spacing, relative to the largest logit:
    far above rounding, far below what another sample in the context does.

    Args:
        model: a model of transformers, not yet adapted.
        samples: the training samples, before packing. Fewer than two are not compared.
        pad_token_id: fills the padding.
        packed: whether batches are packed, else padded.

    Raises:
        ConfigError: the samples of a batch change one another's logits.
    """
    pair = _pair(samples)
    if pair is None:
        return
    collator = Collator(pad_token_id)
    training = model.training
    model.eval()
    try:
        alone = [_logits(model, collator([sample]))[0] for sample in pair]
        batch = pack(pair, sum(LENGTHS)) if packed else pair
        together = _logits(model, collator(batch))
    finally:
        model.train(training)
    if packed:
        parts = together[0].split([len(sample.input_ids) for sample in pair])
    elif alone[0].dim() == 2:  # logits of every token; language models are padded on the left
        parts = [row[-len(own) :] for row, own in zip(together, alone, strict=True)]
    else:
        parts = together
    tolerance = torch.finfo(together.dtype).eps ** 0.5 * max(own.abs().max() for own in alone)
    if all((part - own).abs().max() <= tolerance for part, own in zip(parts, alone, strict=True)):
        return
    name = type(model).__name__
    if packed:
        raise ConfigError(
            f"batching is 'packed', but {name} does not keep packed samples apart: the logits of "
            "two samples in one sequence are not those of each alone; expected 'length-grouped'"
        )
    raise ConfigError(
        f"{name} does not ignore padding: the logits of a padded sample are not those of the "
        "sample alone; expected batch_size = 1 and eval_batch_size = 1"
    )


def _pair(samples: Sequence[Encoded]) -> list[Encoded] | None:
    """A long and a shorter sample, cut to `LENGTHS`; None if there are fewer than two."""
    if len(samples) < 2:
        return None
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    other = next(sample for sample in samples if sample is not longest)
    return [_cut(longest, LENGTHS[0]), _cut(other, min(LENGTHS[1], len(longest.input_ids) - 1))]


def _cut(sample: Encoded, length: int) -> Encoded:
    labels = sample.labels[:length] if isinstance(sample.labels, list) else sample.labels
    return Encoded(sample.input_ids[:length], labels, segments=sample.segments[:length])


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    # As in training: with a cache, models would not look for the boundaries of packed samples.
    return model(**inputs, **({"use_cache": False} if "position_ids" in inputs else {})).logits


__all__ = ["check_separation"]
