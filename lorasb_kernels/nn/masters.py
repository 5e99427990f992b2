"""Tensors that never go below fp32, whatever `half()`, `bfloat16()` or `to(dtype)` asks for."""

from collections.abc import Callable, Iterable

import torch


def masters_kept(
    fn: Callable[[torch.Tensor], torch.Tensor], masters: Iterable[torch.Tensor | None]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn`, the conversion that `nn.Module._apply` is given, with `masters` left in fp32 or more.

    They follow it to another device and to fp64; if it would round them to 16 bits, they are
    converted to fp32 without that rounding.
    """
    kept = {id(tensor) for tensor in masters if tensor is not None}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        if id(tensor) not in kept or not result.is_floating_point():
            return result
        master = torch.promote_types(result.dtype, torch.float32)
        return result if result.dtype == master else tensor.to(result.device, master)

    return convert


__all__ = ["masters_kept"]
