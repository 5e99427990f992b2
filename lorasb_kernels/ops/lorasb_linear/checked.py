"""Which arguments have passed all checks before, and the backend that was chosen for them.

The checks and the choice depend on types, dtypes, devices and shapes, and on no number in a tensor,
so a layer is checked in its first call and again only when one of these changes. What is compared
is read from the tensors in every call, as a tensor can change it in place: `.data`, `.to()`.
"""

from lorasb_kernels.ops.dispatch import PLAIN_TENSORS

_LIMIT = 4096  # of arguments that are remembered; a model has a few dozen different ones
_backends: dict[tuple, str] = {}


def _key(backend, x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout) -> tuple:
    return (
        *(backend, scaling, dropout, type(x), x.dtype, x.device, x.shape[-1]),
        *(type(weight), weight.dtype, weight.device, weight.shape, weight.requires_grad),
        *(type(lora_A), lora_A.dtype, lora_A.device, lora_A.shape),
        *(type(lora_B), lora_B.dtype, lora_B.device, lora_B.shape),
        lora_R is not None and (type(lora_R), lora_R.dtype, lora_R.device, lora_R.shape),
        bias is not None and (type(bias), bias.dtype, bias.device, bias.shape, bias.requires_grad),
    )


def checked_before(backend, *operands) -> str | None:
    """The backend that runs, if arguments like these have passed the checks; None if not.

    Args:
        backend: as the caller named it.
        operands: x, weight, lora_A, lora_R, lora_B, bias, scaling and dropout, of any types.
    """
    try:
        return _backends.get(_key(backend, *operands))
    except (AttributeError, IndexError, TypeError, RuntimeError):  # not tensors; no dimension
        return None


def remember(chosen: str, backend: str, *operands) -> bool:
    """Keeps for `checked_before` that these arguments passed, and the backend `chosen` for them.

    Returns:
        Whether they are kept, which only plain tensors are.
    """
    *tensors, _, _ = operands
    if not all(tensor is None or type(tensor) in PLAIN_TENSORS for tensor in tensors):
        return False
    if len(_backends) >= _LIMIT:
        _backends.clear()
    _backends[_key(backend, *operands)] = chosen
    return True


__all__ = ["checked_before", "remember"]
