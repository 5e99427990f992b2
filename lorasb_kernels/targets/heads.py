"""The heads of a model, which "all-linear" leaves alone.

They are its output embeddings, and what starts at random for a new task and so has to be trained
whole (`modules_to_save`). What else lies outside of the base model, such as the decoder of ViTMAE
or the action projections of pi0, was trained with it and is adapted.
"""

import re

from torch import nn

from lorasb_kernels.linear_layers import is_linear, matrix_shape

# Classes whose layers outside of the base model are a new task's.
_NEW_TASK = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector|Segmentation|Detection)$"
)


def head_modules(model: nn.Module) -> set[int]:
    """The modules of the heads, by identity."""
    heads: set[int] = set()
    for module in model.modules():
        for head in _output_embeddings(module):
            heads |= {id(part) for part in head.modules()}
    if not _NEW_TASK.search(type(model).__name__):
        return heads
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = {id(module) for module in body.modules()}
        return heads | {id(module) for module in model.modules() if id(module) not in inside}
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    # A model without a base model: its classifier is a layer of its own, one output per label.
    return heads | {
        id(child)
        for child in model.children()
        if is_linear(child) and matrix_shape(child)[0] == labels
    }


def _output_embeddings(module: nn.Module) -> list[nn.Module]:
    """What `get_output_embeddings` of a transformers model returns, one module or several."""
    method = getattr(module, "get_output_embeddings", None)
    if not callable(method):
        return []
    try:
        found = method()
    except (NotImplementedError, AttributeError):
        return []
    found = found if isinstance(found, (list, tuple)) else [found]
    return [head for head in found if isinstance(head, nn.Module)]


__all__ = ["head_modules"]
