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
computes for itself.

A write that no version shows, through `x.data` or `lora_R.data`, is looked for in the first call of
a parent in each mode (training or not, with gradients or without): x, A and R are copied when they
are projected, and compared when a sibling is called. A parent that writes so between two siblings
is left ungrouped, with a warning. One that starts to do so in a later call is not noticed.

A sibling for which a projection was computed in vain, because it came with another input or not
at all, as the keys of a cross-attention under an unknown name, is left to itself from then on.
"""

import threading
import warnings
from dataclasses import dataclass
from typing import NamedTuple

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
        name: of their parent in the model.
    """

    def __init__(self, layers: list[AdaptedLinear], name: str = ""):
        self.layers, self.name = layers, name
        self._hooks: list[RemovableHandle] = []
        self._observed: set[tuple[bool, bool]] = set()  # modes with a call without hidden writes
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
        if torch.compiler.is_compiling():
            return
        self._thread.call = None
        if len(self.layers) > 1:
            mode = (self.layers[0].training, torch.is_grad_enabled())
            self._thread.call = _Call(self.layers, mode, mode not in self._observed)

    def close(self, parent=None, args=(), output=None) -> None:
        """Ends a call of the parent, as its forward hook; `output` is None after an error."""
        if torch.compiler.is_compiling():
            return
        call, self._thread.call = self._thread.call, None
        if call is None or output is None:
            return
        if call.hidden_write:
            self.detach()
            warnings.warn(
                f"{self.name or 'the parent of siblings'} writes to their input, A or R between "
                "two siblings without a new version (through .data): each computes for itself now",
                stacklevel=2,
            )
            return
        if call.observed:
            self._observed.add(call.mode)
        unused = call.unused()
        self.layers = [layer for layer in self.layers if id(layer) not in unused]

    def forward(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The output of `layer` for `x`; None when it has to compute for itself."""
        if torch.compiler.is_compiling() or (call := self._thread.call) is None:
            return None
        return call.output(layer, x)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._thread = _Thread()


class _Factors(NamedTuple):
    """What a layer's projection is computed from, beside its input."""

    lora_A: torch.Tensor
    lora_R: torch.Tensor | None
    settings: tuple  # which layers that are projected together have in common
    state: tuple

    @classmethod
    def of(cls, layer: AdaptedLinear, device: torch.device) -> "_Factors | None":
        """None if the layer projects for itself, or a change of its factors could go unseen."""
        if layer.training and layer.dropout > 0:
            return None
        lora_A, lora_R = layer.lora_A, layer.lora_R
        scaling, backend = layer.scaling, layer.backend
        if not _is_plain(lora_A, device):
            return None
        settings = (scaling, backend, lora_A.shape, lora_A.dtype)
        state = (scaling, backend, *_version_of(lora_A))
        if lora_R is not None:
            if not _is_plain(lora_R, device):
                return None
            settings += (lora_R.shape, lora_R.dtype)
            state += _version_of(lora_R)
        return cls(lora_A, lora_R, settings, state)


@dataclass
class _Projection:
    """An input projected for several layers."""

    common: CommonInput
    x: torch.Tensor
    x_state: tuple
    # Number and factors by id(layer), of those not called yet; alive, so that no id is used again.
    waiting: dict[int, tuple[int, _Factors]]
    copies: list[list[torch.Tensor]] | None  # x, A and R by the layer's number, to compare with


class _Call:
    """A call of the parent: the layers not called yet, and the last projection.

    Args:
        layers: of the group.
        mode: of the parent.
        observe: whether to look for writes that no version shows. `observed` says whether a
            sibling was looked at, `hidden_write` whether there was one.
    """

    def __init__(self, layers: list[AdaptedLinear], mode: tuple[bool, bool], observe: bool):
        self.waiting = {id(layer): layer for layer in layers}
        self.projection: _Projection | None = None
        self.mode, self.observe = mode, observe
        self.observed = self.hidden_write = False
        self._unused: set[int] = set()

    def unused(self) -> set[int]:
        """The layers, by id, for which the input of another one was projected in vain."""
        return self._unused | (self.projection.waiting.keys() if self.projection else set())

    def output(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """As `SharedInput.forward`."""
        if self.waiting.pop(id(layer), None) is None or torch.is_inference_mode_enabled():
            return None
        factors = _Factors.of(layer, x.device) if _is_plain(x, x.device) else None
        if factors is None or (self.observe and not _is_readable(x)):
            return None
        projection = self.projection
        number = None if projection is None else self._number(projection, layer, factors, x)
        if number is None:
            projection = self.projection = self._project(layer, factors, x)
            if projection is None:
                return None
            number = 0
        if not projection.waiting:
            self.projection = None
        operands = projection.common.operands(
            layer.frozen_weight(), factors.lora_A, layer.core(), layer.lora_B, layer.bias
        )
        return projection.common.output(number, x, *operands)

    def _number(self, projection, layer, factors: _Factors, x: torch.Tensor) -> int | None:
        """The layer's number in `projection`; None if it would not compute the same now."""
        if projection.x is not x:
            self._unused |= projection.waiting.keys()
            return None
        number, then = projection.waiting.pop(id(layer), (None, None))
        unchanged = (
            then is not None
            and then.state == factors.state
            and projection.x_state == _input_state(x)
        )
        if unchanged and projection.copies is not None:
            self.observed = True
            self.hidden_write |= not _equal(_read(x, factors), projection.copies[number])
            unchanged = not self.hidden_write
        return number if unchanged else None

    def _project(self, first, factors: _Factors, x: torch.Tensor) -> _Projection | None:
        """The projection of `x` for `first`, number 0, and those of its siblings still to come."""
        layers, members = [first], [factors]
        for layer in self.waiting.values():
            other = None if layer.merged else _Factors.of(layer, x.device)
            if other is not None and other.settings == factors.settings:
                layers.append(layer)
                members.append(other)
        if len(layers) == 1:
            return None
        copies = None
        if self.observe:
            x_copy = x.detach().clone()
            copies = [[x_copy, *(f.clone() for f in _read(x, m)[1:])] for m in members]
        As, Rs, _, _ = zip(*members, strict=True)
        sizes = [layer.out_features for layer in layers]
        numbered = {id(layer): (i, members[i]) for i, layer in enumerate(layers) if i > 0}
        common = CommonInput(x, As, Rs, sizes, first.scaling, first.backend)
        return _Projection(common, x, _input_state(x), numbered, copies)


def _read(x: torch.Tensor, factors: _Factors) -> list[torch.Tensor]:
    """What a layer's projection is computed from."""
    tensors = (x, factors.lora_A, factors.lora_R)
    return [tensor.detach() for tensor in tensors if tensor is not None]


def _equal(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether all have the same values, NaN among them."""
    return all(
        torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)
        for tensor, other in zip(tensors, others, strict=True)
    )


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is on `device` and has a version."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device == device
        and not tensor.is_inference()
    )


def _is_readable(x: torch.Tensor) -> bool:
    """Whether the host can read values now: not of meta tensors, nor in a CUDA graph's capture."""
    return not x.is_meta and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _version_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    return (id(tensor), tensor._version, tensor.data_ptr())


def _input_state(x: torch.Tensor) -> tuple:
    return (
        *_version_of(x),
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
                groups.append(SharedInput(layers, name))
                groups[-1].attach(parent)
    return groups


__all__ = ["SharedInput", "share_inputs"]
