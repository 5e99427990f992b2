"""Layers of one parent that read the same input and are computed together (q, k, v; gate, up).

What is shared is the projection alone: in a call of the parent, the first layer to see an input
projects it for those of its siblings that have not been called yet, in one pass. Everything
else a layer does when it is called, with what it is then: its frozen product, its expansion, its
hooks, its autograd node. So there are only x, A, R and the settings to compare, and a layer takes
its share of the projection if

* the call of the parent in which it was computed is still going on, in this thread. Hooks of the
  parent open and close it. A layer called otherwise computes for itself: what happens between
  two calls, of the layers or of the parent, cannot make it wrong, and nothing is held.
* x, A and R are the same tensors in the same memory at the same version, autocast, the
  stream, the scaling and the backend as they were;
* it has not been called before in this call.

If not, it projects anew, for itself and for those still to come. Without a version (inference
mode, `torch.compile`) and with dropout, where each layer has a mask of its own, every layer
computes for itself. What no version shows, and so must not happen while the parent's forward runs,
is a write through `x.data` or `lora_R.data` between two siblings.

A sibling for which a projection was computed in vain, because it came with another input or not
at all, as the keys of a cross-attention under an unknown name, is left to itself from then on.
"""

import threading
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.ops.lorasb_linear import CommonInput
from lorasb_kernels.ops.precision import autocast_dtype

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


class _Thread(threading.local):
    """The call of the parent that is going on in this thread."""

    call: "_Call | None" = None


class SharedInput:
    """The adapted layers of one parent that read one input; each has it as `shared_input`.

    Args:
        layers: two or more.
    """

    def __init__(self, layers: list[AdaptedLinear]):
        self.layers = layers
        self._hooks: list[RemovableHandle] = []
        self._thread = _Thread()
        for layer in layers:
            layer.shared_input = self

    def attach(self, parent: nn.Module) -> None:
        """Shares the input in calls of `parent` from now on."""
        self._hooks += [
            parent.register_forward_pre_hook(self.open),
            parent.register_forward_hook(self.close, always_call=True),
        ]

    def detach(self) -> None:
        """Lets each layer compute for itself again; nothing where that is so already."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            layer.shared_input = None
        self.layers, self._hooks = [], []

    def open(self, *_) -> None:
        """Begins a call of the parent, as its forward pre-hook."""
        if not torch.compiler.is_compiling():
            self._thread.call = _Call(self.layers) if len(self.layers) > 1 else None

    def close(self, parent=None, args=(), output=None) -> None:
        """Ends a call of the parent, as its forward hook; `output` is None after an error."""
        if torch.compiler.is_compiling():
            return
        call, self._thread.call = self._thread.call, None
        if call is not None and output is not None:
            unused = call.unused()
            self.layers = [layer for layer in self.layers if id(layer) not in unused]

    def forward(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `layer` for `x`; None when it has to compute for itself."""
        if torch.compiler.is_compiling() or (call := self._thread.call) is None:
            return None
        return call.output(layer, x)

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "_hooks": self._hooks}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._thread = _Thread()


@dataclass
class _Projection:
    """An input projected for several layers, and what it was computed from."""

    common: CommonInput
    x: torch.Tensor
    x_state: tuple
    states: dict[int, tuple]  # by id(layer), for the layers that have not come yet
    order: dict[int, int]
    factors: list[torch.Tensor]  # kept alive: a state holds their ids

    def take(self, layer: AdaptedLinear, x: torch.Tensor) -> int | None:
        """The layer's number, if this is the projection that it would compute."""
        key = id(layer)
        if self.x is not x or key not in self.states or self.x_state != _input_state(x):
            return None
        return self.order[key] if self.states.pop(key) == _layer_state(layer) else None


class _Call:
    """A call of the parent: the layers not called yet, and the last projection."""

    def __init__(self, layers: list[AdaptedLinear]):
        self.waiting = {id(layer): layer for layer in layers}
        self.projection: _Projection | None = None
        self._unused: set[int] = set()

    def unused(self) -> set[int]:
        """The layers, by id, for which the input of another one was projected in vain."""
        return self._unused | (self.projection.states.keys() if self.projection else set())

    def output(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor | None:
        if self.waiting.pop(id(layer), None) is None or not _shareable(layer, x):
            return None
        index = None if self.projection is None else self.projection.take(layer, x)
        if index is None:
            if self.projection is not None and self.projection.x is not x:
                self._unused |= self.projection.states.keys()
            self.projection = self._project(layer, x)
            if self.projection is None:
                return None
            index = self.projection.take(layer, x)
        common = self.projection.common
        if not self.projection.states:
            self.projection = None
        operands = common.operands(
            layer.frozen_weight(), layer.lora_A, layer.core(), layer.lora_B, layer.bias
        )
        return common.output(index, x, *operands)

    def _project(self, first: AdaptedLinear, x: torch.Tensor) -> _Projection | None:
        settings = _settings(first)
        others = [
            layer
            for layer in self.waiting.values()
            if _shareable(layer, x) and _settings(layer) == settings
        ]
        if not others:
            return None
        layers = [first, *others]
        As, Rs = ([getattr(layer, name) for layer in layers] for name in ("lora_A", "lora_R"))
        sizes = [layer.out_features for layer in layers]
        return _Projection(
            CommonInput(x, As, Rs, sizes, first.scaling, first.backend),
            x,
            _input_state(x),
            {id(layer): _layer_state(layer) for layer in layers},
            {id(layer): index for index, layer in enumerate(layers)},
            [*As, *Rs],
        )


def _shareable(layer: AdaptedLinear, x: torch.Tensor) -> bool:
    """Whether a projection of `x` by `layer` can be compared later with what it came from."""
    if layer.merged or (layer.training and layer.dropout > 0):
        return False
    if torch.is_inference_mode_enabled():
        return False
    tensors = [x, *_factors(layer)]
    return all(
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device == x.device
        and not tensor.is_inference()
        for tensor in tensors
    )


def _factors(layer: AdaptedLinear) -> list[torch.Tensor]:
    return [layer.lora_A] if layer.lora_R is None else [layer.lora_A, layer.lora_R]


def _settings(layer: AdaptedLinear) -> tuple:
    """What layers that are projected together must have in common."""
    shapes = [(factor.shape, factor.dtype) for factor in _factors(layer)]
    return (layer.scaling, layer.backend, *shapes)


def _layer_state(layer: AdaptedLinear) -> tuple:
    return (layer.scaling, layer.backend, *map(_tensor_state, _factors(layer)))


def _tensor_state(tensor: torch.Tensor) -> tuple:
    return (id(tensor), tensor._version, tensor.data_ptr())


def _input_state(x: torch.Tensor) -> tuple:
    return (
        *_tensor_state(x),
        x.shape,
        x.stride(),
        x.requires_grad,
        x.grad_fn,
        autocast_dtype(x.device.type),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )


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
                if layers[0].shared_input is not None:
                    layers[0].shared_input.detach()
                groups.append(SharedInput(layers))
                groups[-1].attach(parent)
    return groups


__all__ = ["SharedInput", "share_inputs"]
