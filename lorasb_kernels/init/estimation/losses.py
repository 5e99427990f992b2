"""The loss of a batch as a sum in which every sample has the same weight.

The update is the sign of Σ_i ∂ℓ_i/∂W, where ℓ_i is the loss of sample i alone: for token
losses the mean over its own labelled tokens. A model's own loss is a mean over all tokens
of a batch instead, so a sample's weight would depend on its length and on the other samples in the
batch.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # a label that carries no loss, as in torch's cross-entropy

TOKEN_LOSSES = ("ForMaskedLM", "ForTokenClassification")
SEQUENCE_LOSSES = ("ForSequenceClassification", "ForImageClassification")


def summed_loss(model: nn.Module, batch: Any, loss_fn: Callable | None, index: int) -> torch.Tensor:
    """Σ ℓ_i over the samples of `batch`, a finite scalar that requires grad.

    Args:
        model: the model.
        batch: what `loss_fn` takes.
        loss_fn: returns the per-sample losses [batch], or their mean as a scalar, which
            then counts `sample_count(batch)` times; None for `per_sample_loss`.
        index: the batch's number, for messages.

    Raises:
        TypeError: a loss that is no floating-point tensor.
        ValueError: no loss, a loss of the wrong shape or one that does not require grad.
        FloatingPointError: a loss that is NaN or infinite.
    """
    losses = (loss_fn or per_sample_loss)(model, batch)
    if losses is None:
        raise ValueError(f"the loss of batch {index} is None; expected a tensor from loss_fn")
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise TypeError(f"the loss of batch {index} is a {kind}; expected a floating-point tensor")
    if losses.dim() > 1:
        raise ValueError(
            f"the loss of batch {index} has shape {tuple(losses.shape)}; "
            "expected the per-sample losses [batch] or their mean, a scalar"
        )
    total = losses.sum() if losses.dim() else losses * sample_count(batch)
    if not total.requires_grad:
        raise ValueError(
            f"the loss of batch {index} does not require grad; expected it to depend on the "
            "target layers: do they take part in the forward pass, and is the loss detached?"
        )
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss of batch {index} is {total.item()}; expected it finite")
    return total


def sample_count(batch: Any) -> int:
    """Number of samples of a batch: the first dimension of its `labels`, else of its first tensor.

    Raises:
        ValueError: `batch` holds no tensor with a dimension.
    """
    if isinstance(batch, Mapping):
        members = [batch["labels"], *batch.values()] if "labels" in batch else batch.values()
    else:
        members = batch if isinstance(batch, (list, tuple)) else [batch]
    for member in members:
        if isinstance(member, torch.Tensor) and member.dim():
            return member.shape[0]
    raise ValueError(
        f"a batch is a {type(batch).__name__} with no tensor in it, so the number of its samples "
        "is unknown; expected loss_fn to return per-sample losses [batch] then"
    )


def per_sample_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of each sample, [batch], fp32, of a transformers model.

    Causal and masked language models, encoder-decoders and token classifiers: mean
    cross-entropy over the sample's labelled tokens, 0 if it has none. Sequence
    classifiers: what the model's `problem_type` says. A row of a batch is a sample.

    Args:
        model: a transformers model with a head.
        batch: the model's inputs, with `labels`; moved to the model's device.

    Raises:
        TypeError: a model or batch of another kind.
        ValueError: no labels.
    """
    task = _task(model)
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a {type(batch).__name__}; expected a dict of model inputs")
    if batch.get("labels") is None:
        raise ValueError(f"a batch has no labels, only {sorted(batch)}; expected 'labels'")
    device = next(model.parameters()).device
    inputs = {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    labels = inputs.pop("labels")
    if task == "causal":
        labels = labels[:, 1:]
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # Logits are computed only in columns where some sample has a label.
            kept = (labels != IGNORED).any(0).nonzero().flatten()
            inputs["logits_to_keep"], labels = kept, labels[:, kept]
    elif task == "encoder-decoder" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(**inputs).logits.float()
    if task == "sequence":
        return _sequence_losses(logits, labels, model.config)
    return _token_losses(logits[:, : labels.shape[1]], labels)


def _task(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    loss_type = getattr(model, "loss_type", "")
    if loss_type in SEQUENCE_LOSSES:
        return "sequence"
    if loss_type in TOKEN_LOSSES:
        return "token"
    # transformers uses the causal loss for generative heads without a loss type.
    if loss_type in ("ForCausalLM", "ForConditionalGeneration", None):
        return "encoder-decoder" if config.is_encoder_decoder else "causal"
    raise TypeError(
        f"model is a {type(model).__name__}, whose per-sample loss is not known here; "
        "expected loss_fn(model, batch) to be given"
    )


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    count = (labels != IGNORED).sum(1).clamp_min(1)
    return losses.view(labels.shape).sum(1) / count


def _sequence_losses(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    problem = config.problem_type
    if problem is None:
        integers = not labels.is_floating_point()
        single = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if config.num_labels == 1 else single
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1), reduction="none")
    labels = labels.view(logits.shape).to(logits.dtype)
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels, reduction="none").mean(1)


__all__ = ["IGNORED", "per_sample_loss", "sample_count", "summed_loss"]
