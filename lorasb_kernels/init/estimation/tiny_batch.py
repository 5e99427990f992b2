"""A tiny random batch for a transformers model, as its configuration describes the inputs."""

from typing import Any

import torch
from torch import nn

TOKENS = 8
SAMPLES_OF_SOUND = 4000  # a quarter of a second at 16 kHz


def tiny_batch(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """One sample of text, an image or sound, on the CPU; None if the model takes something else.

    Args:
        model: a transformers model; any other gets None.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        return torch.randn(shape, generator=generator).to(dtype)

    if not hasattr(config, "get_text_config"):
        return None
    if name == "input_ids":
        batch = {name: _tokens(config, generator)}
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        batch = {name: noise(1, getattr(vision, "num_channels", 3), height, width)}
    elif name == "input_values":
        batch = {name: noise(1, SAMPLES_OF_SOUND)}
    elif name == "input_features" and (bins := getattr(config, "num_mel_bins", None)):
        batch = {name: noise(1, bins, 2 * getattr(config, "max_source_positions", 50))}
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _tokens(config, generator)
    return batch


def _tokens(config: Any, generator: torch.Generator) -> torch.Tensor:
    """Token ids [1, TOKENS] that stand for text: none that the configuration gives a meaning."""
    text = config.get_text_config()
    special = {
        value
        for some in (config, text)
        for key, value in vars(some).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(min(text.vocab_size, 1000)) if token not in special]
    picks = torch.randint(len(plain), (1, TOKENS), generator=generator)
    return torch.tensor(plain)[picks]


__all__ = ["tiny_batch"]
