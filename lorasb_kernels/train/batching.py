"""From encoded samples to batches: packing, length-grouped order, padding.

The order of the samples depends only on the seed and the epoch, so a resumed run gets the same
batches as an uninterrupted one.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.encoding import Encoded

STEPS_GROUPED = 16  # optimizer steps whose samples are sorted by length together


def pack(samples: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Joins samples into sequences of at most `max_length` tokens, best fit, longest first.

    `positions` restart at 0 with each sample; models of transformers take that for a
    boundary that attention does not cross. The first label of a sample is ignored, so no
    sample is asked to predict the next one's start.
    """
    by_room: list[list[Encoded]] = [[] for _ in range(max_length + 1)]
    packs = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        room = next((room for room in range(length, max_length + 1) if by_room[room]), None)
        if room is None:
            packed = Encoded([], [], [])
            packs.append(packed)
            room = max_length
        else:
            packed = by_room[room].pop()
        packed.input_ids.extend(sample.input_ids)
        packed.labels.extend([IGNORED, *sample.labels[1:]])
        packed.positions.extend(range(length))
        by_room[room - length].append(packed)
    return packs


class LengthGroupedSampler(Sampler[int]):
    """Random order in which the samples of one optimizer step have similar lengths.

    transformers' sampler of this name draws from a random state that a checkpoint within an epoch
    no longer has, so a resumed epoch would have another order.

    Samples are shuffled and cut into groups of `STEPS_GROUPED` steps; each group is sorted
    by length, cut into steps, and its full steps are shuffled.

    Args:
        lengths: tokens of each sample.
        step: samples of one optimizer step, over all devices and forward passes.
        seed: with the epoch, fixes the order.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int):
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        for group in _chunks(order, self.step * STEPS_GROUPED):
            steps = _chunks(sorted(group, key=lambda i: -self.lengths[i]), self.step)
            remainder = [steps.pop()] if len(steps[-1]) < self.step else []
            rng.shuffle(steps)
            for step in steps + remainder:
                yield from step


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Collator:
    """Pads encoded samples into a batch of tensors.

    Language models are padded on the left, so that responses end at the right edge and few
    columns carry labels; classifiers on the right, as encoders read their first token. A
    packed batch has no attention mask: its positions mark the boundaries.

    Args:
        pad_token_id: fills the padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        longest = max(len(sample.input_ids) for sample in samples)
        causal = isinstance(samples[0].labels, list)

        def padded(rows: list[Sequence[int]], filler: int) -> torch.Tensor:
            fill = [[filler] * (longest - len(row)) for row in rows]
            pairs = zip(fill, rows, strict=True)
            return torch.tensor([[*f, *row] if causal else [*row, *f] for f, row in pairs])

        batch = {"input_ids": padded([s.input_ids for s in samples], self.pad_token_id)}
        if not samples[0].positions:
            batch["attention_mask"] = padded([[1] * len(s.input_ids) for s in samples], 0)
        if samples[0].segments:
            batch["token_type_ids"] = padded([s.segments for s in samples], 0)
        if causal:
            positions = [s.positions or range(len(s.input_ids)) for s in samples]
            batch["position_ids"] = padded(positions, 0)
            batch["labels"] = padded([s.labels for s in samples], IGNORED)
        else:
            batch["labels"] = torch.tensor([s.labels for s in samples])
        return batch
