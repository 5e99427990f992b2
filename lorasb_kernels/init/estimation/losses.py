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
from torch.utils import _pytree as pytree

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
    classifiers: what the model's `problem_type` says. A row of a batch is a sample. Any other
    model: its own loss, of one sample at a time.

    Args:
        model: a transformers model with a head.
        batch: the model's inputs, with `labels`; moved to the model's device.

    Raises:
        TypeError: a model or batch of another kind.
        ValueError: no labels, a model that returns no loss, or a batch that cannot be split.
    """
    task = _task(model, batch if isinstance(batch, Mapping) else {})
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a {type(batch).__name__}; expected a dict of model inputs")
    if task != "own" and batch.get("labels") is None:
        raise ValueError(f"a batch has no labels, only {sorted(batch)}; expected 'labels'")
    device = next(model.parameters()).device
    inputs = {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    if task == "own":
        return own_losses(model, inputs)
    labels = inputs.pop("labels")
    if task == "causal":
        labels = labels[:, 1:]
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # Logits are computed only in columns where some sample has a label.
            kept = (labels != IGNORED).any(0).nonzero().flatten()
            inputs["logits_to_keep"], labels = kept, labels[:, kept]
    elif task == "encoder-decoder" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(model, labels)
    logits = model(**inputs).logits.float()
    if task == "sequence":
        return _sequence_losses(logits, labels, model.config)
    return _token_losses(logits[:, : labels.shape[1]], labels)


def own_losses(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's own loss of each sample, [batch], fp32; it is run on one at a time.

    Args:
        model: a transformers model.
        batch: its inputs, with the labels that it takes.

    Raises:
        ValueError: a model that returns no loss, or a batch that cannot be split.
    """
    device = next(model.parameters()).device
    samples = _samples(pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), dict(batch)))
    return torch.stack([_own_loss(model, sample) for sample in samples])


def default_loss(model: nn.Module, batches: list) -> tuple[Callable, list]:
    """The function that gives the losses of samples, and the batches to give it.

    `per_sample_loss`, unless the model computes something else from the first sample: some causal
    models do not shift labels, others smooth them or add a term. Then it is `own_losses`, and the
    batches are split into single samples, so that no more than one is in memory.
    """
    first = batches[0]
    if not isinstance(first, Mapping) or getattr(model, "config", None) is None:
        return per_sample_loss, batches
    if _task(model, first) != "own":
        sample = _samples(first)[0]
        with torch.no_grad():
            ours = per_sample_loss(model, sample)[0]
            try:
                own = own_losses(model, sample)[0]
            except (TypeError, ValueError):
                return per_sample_loss, batches
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2
        if not own.isfinite() or torch.isclose(ours, own, rtol=tolerance, atol=tolerance):
            return per_sample_loss, batches
    return own_losses, [sample for batch in batches for sample in _samples(batch)]


def _samples(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch as batches of one sample: the rows of all its tensors."""
    count = sample_count(batch)
    if count == 1:
        return [dict(batch)]
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] != count:
            raise ValueError(
                f"{key} has {value.shape[0]} rows in a batch of {count} samples; expected one per "
                "sample, batches of one sample, or loss_fn"
            )
    return [
        {
            key: value[index : index + 1] if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        for index in range(count)
    ]


def _own_loss(model: nn.Module, sample: dict[str, Any]) -> torch.Tensor:
    """The loss that the model computes for one sample; 0 if no token of it is labelled."""
    labels = sample.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() > 1 and (labels == IGNORED).all():
        return torch.zeros((), device=labels.device)
    loss = getattr(model(**sample), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for {sorted(sample)}; expected the labels "
            "that it takes, or loss_fn"
        )
    return loss.float()


def _decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """The decoder's inputs for `labels`; None for a model that shifts them only in its forward."""
    try:
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    except AttributeError:
        return None


def _task(model: nn.Module, batch: Mapping[str, Any]) -> str:
    config = getattr(model, "config", None)
    loss_type = getattr(model, "loss_type", "")
    if loss_type in SEQUENCE_LOSSES:
        return "sequence"
    # transformers uses the causal loss for generative heads without a loss type.
    generative = loss_type in ("ForCausalLM", "ForConditionalGeneration", None)
    if getattr(config, "is_encoder_decoder", False) and (generative or loss_type == "ForMaskedLM"):
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor):
            return "encoder-decoder"
        shifted = "decoder_input_ids" in batch or _decoder_inputs(model, labels) is not None
        return "encoder-decoder" if labels.dim() == 2 and shifted else "own"
    if generative:
        return "causal"
    if loss_type in TOKEN_LOSSES:
        return "token"
    if config is not None:
        return "own"
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


__all__ = [
    "IGNORED",
    "default_loss",
    "own_losses",
    "per_sample_loss",
    "sample_count",
    "summed_loss",
]
