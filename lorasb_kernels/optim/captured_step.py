"""Forward, backward and clipping of a training step as CUDA graphs.

A graph replays all launches of a step in one call: nothing of Python, the dispatcher or autograd is
left to wait for. That matters where kernels are short: small models, few tokens.

    graph 1     loss of a micro-batch, and its gradients added to those of the step
    graph 2     the norm of the gradients, and clipping (with `max_grad_norm`)

The optimizer stays outside: for cores it is a few launches, any optimizer may be used, and the
learning rate is read in each step. What a graph would freeze is none of these:

* Dropout. The adapters' masks follow from a seed that each call draws on the device, with the
  generator whose state a graph advances when it is replayed. So does `torch.nn.Dropout`.
* The number of micro-batches. The first of them finds the gradients at zero.
* What layers count in their buffers, as BatchNorm does: a replay updates it. The passes before the
  capture leave no trace in it.

What cannot be captured is said before the capture, or is the cause of the error that ends it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]
# Passes before the capture: the vendor's libraries load, kernels compile, routes are timed.
WARM_UP = 3


def mean_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    return model(**batch).loss


class CapturedStep:
    """The gradients of a training step, computed by replaying CUDA graphs.

        step = CapturedStep(model, batch, max_grad_norm=1.0)
        for micro_batches in data:          # a list of batches of one shape
            loss, norm = step(micro_batches)
            optimizer.step()

    Every call sets `.grad` of the trained parameters to the gradients of this step:
    `optimizer.zero_grad()` is not needed and does no harm. The results lie in memory that the next
    call overwrites; `loss.item()` waits for the step.

    What is trained, the shapes of a batch and the model's mode (`train()`, merged adapters, hooks)
    are those of the capture. The parameters' values are read in every replay.

    Args:
        model: on one CUDA device, with at least one parameter that requires grad.
        batch: tensors by name, on that device; its values do not matter, but the loss must be
            defined on them, as they are used for the passes before the capture.
        loss: maps model and batch to a scalar; what runs in it must not wait for the device.
        max_grad_norm: norm to which the gradients of a step are clipped; None: they are not.

    Raises:
        TypeError: a value of `batch` that is not a tensor.
        ValueError: no trained parameter, tensors on several devices, a `max_grad_norm` that is not
            positive.
        RuntimeError: no CUDA device; gradient checkpointing, which saves and restores the state of
            the generator; anything else that a capture refuses, with its cause.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        loss: Callable[[nn.Module, Batch], torch.Tensor] = mean_loss,
        max_grad_norm: float | None = None,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm}; expected a positive number or None"
            )
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._device = _common_device(self._trained, batch)
        _check_capturable(model)
        self._buffers = list(model.buffers())
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        self._gradients = [torch.zeros_like(parameter) for parameter in self._trained]
        self._attach_gradients()
        self._loss = torch.zeros((), device=self._device)
        self._share = torch.ones((), device=self._device)
        self._norm: torch.Tensor | None = None

        def micro_batch() -> None:
            own = loss(model, self._batch) * self._share
            own.backward()
            self._loss.add_(own.detach())

        def clip(limit: float) -> None:
            self._norm = nn.utils.clip_grad_norm_(self._trained, limit, foreach=True)

        self._run_micro_batch = self._captured(micro_batch)
        self._clip = None
        if max_grad_norm is not None:
            self._clip = self._captured(partial(clip, max_grad_norm))
        torch._foreach_zero_(self._gradients)  # those of the passes before the capture

    def __call__(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the gradients of the mean of the micro-batches' losses.

        Args:
            micro_batches: at least one, with the names, shapes and dtypes of the captured batch.

        Returns:
            That mean, and the norm of the gradients before clipping; None without clipping.

        Raises:
            ValueError: no micro-batch, or one that differs from what was captured.
        """
        if not micro_batches:
            raise ValueError("micro_batches is empty; expected at least one batch")
        for batch in micro_batches:
            self._check_batch(batch)
        self._attach_gradients()
        torch._foreach_zero_([*self._gradients, self._loss])
        self._share.fill_(1 / len(micro_batches))
        for batch in micro_batches:
            for name, tensor in batch.items():
                self._batch[name].copy_(tensor, non_blocking=True)
            self._run_micro_batch()
        if self._clip is not None:
            self._clip()
        return self._loss, self._norm

    def _attach_gradients(self) -> None:
        """`zero_grad()` drops the gradients that the graphs write to."""
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient

    def _check_batch(self, batch: Batch) -> None:
        if batch.keys() != self._batch.keys():
            raise ValueError(f"a batch has {sorted(batch)}; expected {sorted(self._batch)}")
        for name, own in self._batch.items():
            given = batch[name]
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"{name} is {given.dtype} of shape {tuple(given.shape)}; expected {own.dtype} "
                    f"of shape {tuple(own.shape)}, as captured: pad the batches, or capture a step "
                    "for each shape"
                )

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph; what it does before the capture leaves no trace in the model's
        buffers and the random state of the device."""
        try:
            with torch.cuda.device(self._device), torch.random.fork_rng([self._device]):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    warm_up(work, self._buffers)
                torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            raise RuntimeError(f"the step cannot be captured as a CUDA graph: {error}") from error
        return graph.replay


def warm_up(work: Callable[[], None], buffers: Sequence[torch.Tensor]) -> None:
    """Calls `work` as often as a capture needs it, and gives `buffers` their values back."""
    values = [buffer.clone() for buffer in buffers]
    try:
        for _ in range(WARM_UP):
            work()
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def _common_device(trained: Sequence[torch.Tensor], batch: Batch) -> torch.device:
    """The CUDA device of all tensors."""
    if not trained:
        raise ValueError("model has no parameter that requires grad; expected an adapted model")
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    device = trained[0].device
    if device.type != "cuda":
        raise RuntimeError(f"model is on {device}; expected a CUDA device, as graphs are CUDA's")
    for name, tensor in [("a trained parameter", t) for t in trained] + list(batch.items()):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, as the others")
    return device


def _check_capturable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise RuntimeError(
                f"gradient checkpointing is on in {name or 'model'}; expected it off: it saves and "
                "restores the state of the generator, which a capture refuses"
            )


__all__ = ["CapturedStep", "mean_loss"]
