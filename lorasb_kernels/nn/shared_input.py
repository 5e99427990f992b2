"""Layers that read the same input and are computed together (q, k, v; gate, up).

The first layer of a group that is called with an input computes the outputs of all of them in one
`lorasb_group` call; the others return the cached outputs. A layer that is called with another input
than its siblings computes only its own output, so a wrong guess about the model costs time but does
not change results. Under `torch.compile` every layer computes its own output: a tensor's version
cannot be read during tracing, so a change of the input between two siblings would not be noticed.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from lorasb_kernels.functional import lorasb_group
from lorasb_kernels.nn.adapted import AdaptedLinear

# Children of one module that read the same tensor, in the supported architectures.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Gemma, Qwen, Phi
    ("query", "key", "value"),  # BERT, RoBERTa
    ("q", "k", "v"),  # T5
    ("gate_proj", "up_proj"),  # gated MLPs
    ("wi_0", "wi_1"),  # gated T5
)
# In cross-attention the queries read something else.
CROSS_ATTENTION = ("crossattention", "EncDecAttention", "encoder_attn", "cross_attn")


@dataclass
class _Pending:
    """Outputs computed for `input` that their layers have not fetched yet."""

    input: torch.Tensor
    state: tuple[bool, int | None]
    outputs: dict[int, torch.Tensor]


def _state(x: torch.Tensor) -> tuple[bool, int | None]:
    """What must not have changed since the outputs were computed."""
    return torch.is_grad_enabled(), None if x.is_inference() else x._version


@dataclass
class SharedInput:
    """A group of adapted layers with one input; each layer holds it as `shared_input`."""

    layers: list[AdaptedLinear]
    _pending: _Pending | None = field(default=None, repr=False)
    _stacked: tuple | None = field(default=None, repr=False)

    def forward(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `layer` for `x`; None if the layer has to compute it."""
        if torch.compiler.is_compiling():
            return None
        pending, key = self._pending, id(layer)
        if (
            pending is not None
            and pending.input is x
            and pending.state == _state(x)
            # Another thread may have taken it in the meantime; then this layer computes its own
            # output.
            and (output := pending.outputs.pop(key, None)) is not None
        ):
            if not pending.outputs:
                self._pending = None
            return output
        self._pending = None
        if layer is not self.layers[0] or any(member.merged for member in self.layers):
            return None
        outputs = self._compute(x)
        waiting = {
            id(member): output for member, output in zip(self.layers[1:], outputs[1:], strict=True)
        }
        self._pending = _Pending(x, _state(x), waiting)
        return outputs[0]

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leader = self.layers[0]
        return lorasb_group(
            x,
            [layer.frozen_weight() for layer in self.layers],
            [layer.lora_A for layer in self.layers],
            [layer.core() for layer in self.layers],
            [layer.lora_B for layer in self.layers],
            [layer.bias for layer in self.layers],
            leader.scaling,
            leader.dropout,
            leader.training,
            leader.backend,
            self._stacked_A(),
        )

    def _stacked_A(self) -> torch.Tensor | None:
        """The stacked A's of the layers, cached until one of them changes.

        None if they are trained: then each forward pass stacks them.
        """
        if "lora_A" in self.layers[0].trained:
            return None
        state = [(layer.lora_A, layer.lora_A._version) for layer in self.layers]
        if self._stacked is not None:
            known, stacked = self._stacked
            if all(a is b and v == w for (a, v), (b, w) in zip(state, known, strict=True)):
                return stacked
        with torch.inference_mode(False):  # it may be used for training later
            stacked = torch.cat([tensor for tensor, _ in state])
        self._stacked = (state, stacked)
        return stacked

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "_pending": None, "_stacked": None}


def share_inputs(model: nn.Module) -> list[SharedInput]:
    """Groups the adapted layers of `model` that read the same input.

    Layers are grouped when they are siblings with the names of a supported architecture,
    all adapted in one way, outside cross-attention. Everything else stays as it is.

    Returns:
        The groups that were made.
    """
    groups = []
    for name, parent in model.named_modules():
        if any(part in CROSS_ATTENTION for part in name.split(".")):
            continue
        for siblings in SIBLINGS:
            layers = [getattr(parent, child, None) for child in siblings]
            if len(set(map(type, layers))) == 1 and isinstance(layers[0], AdaptedLinear):
                group = SharedInput(layers)
                for layer in layers:
                    layer.shared_input = group
                groups.append(group)
    return groups


__all__ = ["SharedInput", "share_inputs"]
