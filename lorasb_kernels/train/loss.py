"""The loss of a batch, with logits only where a label is."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_kernels.init.estimation.losses import IGNORED


def token_losses(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every labelled token of a causal language model.

    The output head runs only on the columns in which some sample has a label: with short
    responses most of the vocabulary-sized logits are never computed.

    Args:
        model: called as `model(**inputs)`; may be wrapped for data-parallel training.
        batch: `input_ids` and `labels` [samples, length], and what else the model takes.

    Returns:
        losses [samples, columns], fp32, 0 where there is no label; and a bool tensor of the same
        shape, True where there is one.
    """
    # With a cache, models of transformers would not look for the boundaries of packed samples.
    inputs = dict(batch, use_cache=False)
    targets = inputs.pop("labels")[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero().flatten()
    if takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    targets = targets[:, columns]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets), targets != IGNORED


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's forward can compute some of its logits only."""
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
