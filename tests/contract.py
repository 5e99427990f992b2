"""The numerical contract: how an output is compared with the float64 oracle.

A kernel passes when its error is at most twice that of eager PyTorch in the same
dtypes plus one rounding of the largest reference element. NaN never passes.
"""

import torch


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    return ((out - ref).norm() / ref.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def max_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """max |out − ref| in float64."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    return (out - ref).abs().max().item() if ref.numel() else 0.0


def assert_within_contract(
    out: torch.Tensor, eager: torch.Tensor, ref: torch.Tensor, *, name: str = "output"
) -> None:
    """Asserts err(out) ≤ 2·(err(eager) + eps·scale), element-wise and in norm.

    Args:
        out: the result under test.
        eager: the same formula in eager PyTorch, same dtypes.
        ref: the oracle, float64.
        name: what `out` is, for the message.
    """
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    eps = torch.finfo(out.dtype).eps
    limit = 2 * (max_error(eager, ref) + eps * ref.abs().max().item())
    error = max_error(out, ref)
    assert error <= limit, f"{name}: max error {error:.3e} > {limit:.3e}"
    limit = 2 * (relative_error(eager, ref) + eps)
    error = relative_error(out, ref)
    assert error <= limit, f"{name}: relative error {error:.3e} > {limit:.3e}"
