"""What must hold for a model of any architecture: adapt, train, merge, save and load."""

import copy
import warnings
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels import (
    LoRASBConfig,
    adapt,
    describe,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lorasb_kernels.init.estimation.losses import default_loss, own_losses
from lorasb_kernels.init.estimation.tiny_batch import tiny_batch
from lorasb_kernels.nn.reached import UnreachedLayerWarning
from lorasb_kernels.targets import Coverage, CoverageWarning, adapted_layers
from tests.families.tiny import VOCABULARY

RATE = 5e-3


def samples(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two samples with the labels of a language model, or of a classifier."""
    batch = {k: torch.cat([v, v.flip(-1)]) for k, v in tiny_batch(model).items()}
    name = type(model).__name__
    if name.endswith("Classification"):
        return batch | {"labels": torch.tensor([0, 1])}
    if "decoder_input_ids" in batch:
        return batch | {"labels": batch.pop("decoder_input_ids")}
    return batch | {"labels": batch["input_ids"].clone()}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, without labels, which some models shift."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch["labels"]
    with torch.no_grad():
        return model(**inputs).logits


def check_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The loss of each sample is the model's own loss of that sample alone."""
    loss_fn, batches = default_loss(model, [batch])
    with torch.no_grad():
        losses = torch.cat([loss_fn(model, part) for part in batches])
        for index, loss in enumerate(losses):
            own = model(**{k: v[index : index + 1] for k, v in batch.items()}).loss
            torch.testing.assert_close(loss, own.float(), rtol=1e-4, atol=1e-5)


def check_family(model: nn.Module, folder: Path) -> Coverage:
    """Adapts, trains, merges, saves and loads `model`; returns its coverage."""
    base, batch = copy.deepcopy(model), samples(model)
    check_losses(model, batch)
    frozen = outputs(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        adapt(model, LoRASBConfig(4), [batch], learning_rate=RATE, progress=False)
        untouched = copy.deepcopy(base)
        adapt(untouched, LoRASBConfig(4, init="orthogonal"), progress=False)
    torch.testing.assert_close(outputs(untouched, batch), frozen, rtol=1e-3, atol=1e-4)
    layers = adapted_layers(model)
    # A core far from zero: an adapter without effect would show when it is merged.
    for layer in layers.values():
        layer.lora_R.data += 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachedLayerWarning)
        for _ in range(2):
            own_losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = outputs(model, batch)
    assert not torch.equal(trained, frozen)
    save_adapter(model, folder)
    loaded = load_adapter(copy.deepcopy(base), folder)
    torch.testing.assert_close(outputs(loaded, batch), trained, rtol=1e-4, atol=1e-5)
    coverage = describe(model).coverage
    merge_and_unload(loaded)
    torch.testing.assert_close(outputs(loaded, batch), trained, rtol=1e-3, atol=1e-3)
    return coverage


__all__ = ["VOCABULARY", "check_family", "check_losses", "outputs", "samples"]
