"""What torch asks of the sign operators: schema, mutation, fake tensors, compilation."""

import pytest
import torch

from lorasb_kernels.functional import sign_accumulate_, sign_gradient, sign_matmul
from tests.ops.operands import normal

TOKENS, M, N, Q = 9, 12, 40, 5


def arguments(operation, device, variant):
    def tensor(*shape):
        return normal(*shape, dtype=torch.float32, device=device)

    planes = [torch.full((M, 2), word, dtype=torch.int32, device=device) for word in (5, 10)]
    weight = tensor(TOKENS) if variant else None
    return {
        "sign_accumulate": (tensor(M, N), tensor(TOKENS, M), tensor(TOKENS, N), weight),
        "sign_gradient": (tensor(TOKENS, M), tensor(TOKENS, N), weight),
        "pack_signs": (tensor(M, N),),
        "sign_matmul": (*planes, tensor(M if variant else N, Q), N, variant),
    }[operation]


@pytest.mark.parametrize("variant", [False, True], ids=["plain", "weighted or transposed"])
@pytest.mark.parametrize(
    "operation", ["sign_accumulate", "sign_gradient", "pack_signs", "sign_matmul"]
)
def test_opcheck(operation, variant, backend, device):
    operator = getattr(torch.ops.lorasb, f"{operation}_{backend}").default
    torch.library.opcheck(operator, arguments(operation, device, variant))


def test_compiles_in_one_graph(backend, device):
    """Operations after the mutation of the accumulator see the new values."""

    def step(acc, dy, x, dense):
        sign_accumulate_(acc, dy, x, backend=backend)
        planes = sign_gradient(dy, x, backend=backend)
        return acc.sum(), sign_matmul(*planes, dense, N, backend=backend)

    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    acc, dy, x, _ = arguments("sign_accumulate", device, False)
    dense = normal(N, Q, dtype=torch.float32, device=device)
    accumulators = [acc.clone(), acc.clone()]
    ours = compiled(accumulators[0], dy, x, dense)
    eager = step(accumulators[1], dy, x, dense)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(*accumulators)
    assert not torch.equal(accumulators[0], acc)
