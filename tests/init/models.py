"""Models of the shapes that estimation must handle, and padded batches for them."""

from functools import partial

import torch
from torch import nn

from tests.models import build

VOCABULARY = 64  # of the models in `tests.models`

# Deep enough to have a first, a middle and a last block, and the special cases between them.
_CHANGES = {
    "llama": {"num_hidden_layers": 3, "attention_dropout": 0.1, "tie_word_embeddings": True},
    "gemma2": {"num_hidden_layers": 4},
    "roberta": {"num_hidden_layers": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
}


def family(architecture: str, **changes) -> nn.Module:
    """A tiny random model in train mode."""
    return build(architecture, **_CHANGES[architecture] | changes).train()


FAMILIES = {architecture: partial(family, architecture) for architecture in _CHANGES}
llama = FAMILIES["llama"]


class Residual(nn.Module):
    """A block of `Stack`: two linear layers around a ReLU that works in place."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        hidden = torch.relu_(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden))


class Stack(nn.Module):
    """A plain model: a linear layer before the blocks, one after; inputs [batch, width]."""

    def __init__(self, width: int = 8, depth: int = 3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.before = nn.Linear(width, width)
            self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
            self.after = nn.Linear(width, 1)

    def forward(self, x):
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


def stack_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Per-sample losses [batch] of a `Stack`."""
    return model(batch).square().squeeze(1)


def stack_batches(sizes: tuple[int, ...] = (3, 2), width: int = 8) -> list[torch.Tensor]:
    """Random inputs for a `Stack`."""
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(sum(sizes), width, generator=generator).split(sizes))


def samples(count: int = 5, seed: int = 1, *, classes: int | None = None) -> list[dict]:
    """Samples of different lengths; labels on some of the tokens, or a class."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(count):
        length = 5 + (3 * index) % 8
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        if classes:
            labels = torch.randint(0, classes, (), generator=generator)
        result.append({"input_ids": ids, "labels": labels})
    return result


def padded(rows: list[dict], *, extra: int = 0) -> dict[str, torch.Tensor]:
    """One batch: rows padded on the right to the longest, and `extra` beyond."""
    length = max(len(row["input_ids"]) for row in rows) + extra

    def fill(tensor, value):
        return nn.functional.pad(tensor, (0, length - len(tensor)), value=value)

    batch = {
        "input_ids": torch.stack([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.stack([fill(torch.ones_like(r["input_ids"]), 0) for r in rows]),
    }
    labels = [row["labels"] for row in rows]
    batch["labels"] = torch.stack([fill(x, -100) if x.dim() else x for x in labels])
    return batch


def batches_for(family: str, sizes: tuple[int, ...] = (2, 2, 1)) -> list[dict]:
    """Samples of the family's task, split into micro-batches of `sizes`."""
    rows = samples(sum(sizes), classes=3 if family == "roberta" else None)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [padded(rows[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def linear_names(model: nn.Module) -> list[str]:
    """All linear layers except the output head."""
    heads = ("lm_head", "classifier")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(heads)
    ]


__all__ = [
    "FAMILIES",
    "Stack",
    "batches_for",
    "linear_names",
    "llama",
    "padded",
    "samples",
    "stack_batches",
    "stack_loss",
]
