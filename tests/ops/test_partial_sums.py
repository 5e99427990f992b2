"""The setting under which torch's GEMM rounds partial sums: told by `explain`, changed by nothing.

That a sum is rounded only a GPU shows; the contract is tested with the setting off.
"""

import pytest
import torch

import lorasb_kernels
from lorasb_kernels.ops.precision import rounded_partial_sums
from tests.ops.conftest import PARTIAL_SUMS

GEMM = torch.backends.cuda.matmul


def explained(dtype) -> str:
    return str(
        lorasb_kernels.explain((4096, 4096, 16), tokens=512, arch="sm_90", dtype=dtype, dropout=0.1)
    )


@pytest.mark.parametrize("dtype", PARTIAL_SUMS)
def test_explain_says_where_torch_may_round_partial_sums(dtype):
    setting = PARTIAL_SUMS[dtype]
    setattr(GEMM, setting, True)
    assert rounded_partial_sums(dtype) == setting
    said = f"torch may round partial sums to 16 bits, as {setting} is True"
    told = [line for line in explained(dtype).splitlines() if said in line]
    assert told == [line for line in explained(dtype).splitlines() if ": two_call " in line]
    assert told, "with dropout the input gradient is two calls"
    for value in (False, (False, False)):  # the pair also forbids to split
        setattr(GEMM, setting, value)
        assert rounded_partial_sums(dtype) is None
        assert "partial sums" not in explained(dtype)


def test_single_precision_has_no_such_setting():
    assert rounded_partial_sums(torch.float32) is None
    assert "partial sums to 16 bits" not in explained(torch.float32)


@pytest.mark.parametrize("value", [True, False])
def test_a_layer_leaves_torchs_settings_alone(value, backend, device):
    names = [*PARTIAL_SUMS.values(), "allow_tf32", "fp32_precision"]
    for setting in PARTIAL_SUMS.values():
        setattr(GEMM, setting, value)
    before = [getattr(GEMM, name) for name in names]
    layer = lorasb_kernels.LoRASBLinear(64, 48, 8, backend=backend).to(device)
    layer(torch.randn(5, 64, device=device, requires_grad=True)).sum().backward()
    assert [getattr(GEMM, name) for name in names] == before
