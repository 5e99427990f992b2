"""What torch asks of an operator: schema, fake, compilation; and lorasb_linear in one graph."""

import itertools

import pytest
import torch

from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.limits import BACKENDS
from tests import formulas
from tests.ops.operands import dropout_seed, normal

M, N, K, R = 9, 12, 40, 5


def arguments(operation: str, device: torch.device, dropout: bool) -> tuple:
    def tensor(*shape):
        return normal(*shape, dtype=torch.float32, device=device)

    As, Rs = ([tensor(R, columns) for _ in range(2)] for columns in (K, R))
    p, seed = (0.25, dropout_seed(device)) if dropout else (0.0, None)
    return {
        "shrink": (tensor(M, K), tensor(R, K), tensor(R, R), 0.5, p, seed),
        "shrink_group": (tensor(M, K), As, Rs, 0.5),
        "core_backward": (tensor(M, N), tensor(M, R), tensor(N, R), tensor(R, R), 0.5),
        "factor_gradient": (tensor(M, R), tensor(M, K), p, seed),
        "expand": (tensor(M, K), tensor(N, K), tensor(M, R), tensor(N, R), None, p, seed),
    }[operation]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("operation", "backend"),
    [
        *itertools.product(["shrink", "core_backward", "expand"], BACKENDS),
        # CUDA's is sign_accumulate, which is checked with the signs.
        *itertools.product(["factor_gradient"], ["reference", "triton"]),
        # CUDA's is shrink, layer by layer.
        *itertools.product(["shrink_group"], ["reference", "triton"]),
    ],
    indirect=["backend"],
)
def test_opcheck(operation, dropout, backend, device):
    operator = getattr(torch.ops.lorasb, f"{operation}_{backend}").default
    torch.library.opcheck(operator, arguments(operation, device, dropout))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_one_graph_for_every_number_of_rows(dropout, backend, device):
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(lorasb_linear, fullgraph=True, dynamic=True, backend=compiler)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 11):
            results = []
            for function in (compiled, lorasb_linear):
                torch.manual_seed(0)
                x = normal(rows, K, dtype=torch.float32, device=device).requires_grad_()
                core = normal(R, R, dtype=torch.float32, device=device).requires_grad_()
                frozen = [
                    normal(*shape, dtype=torch.float32, device=device)
                    for shape in ((N, K), (R, K), (N, R))
                ]
                weight, lora_A, lora_B = frozen
                y = function(x, weight, lora_A, core, lora_B, dropout=dropout, backend=backend)
                y.square().sum().backward()
                results.append((y.detach(), x.grad, core.grad))
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager)


def test_gradients_of_a_layer_equal_the_formula(backend, device):
    """The chain shrink, expand, core_backward, expand, with dropout and one mask throughout."""
    x = normal(37, 70, dtype=torch.float32, device=device).requires_grad_()
    core = normal(24, 24, dtype=torch.float32, device=device, seed=1).requires_grad_()
    weight, lora_A, lora_B = (
        normal(*shape, dtype=torch.float32, device=device, seed=2) / 8
        for shape in ((50, 70), (24, 70), (50, 24))
    )
    dy = normal(37, 50, dtype=torch.float32, device=device, seed=3)
    torch.manual_seed(3)
    seed = new_seed(device)
    torch.manual_seed(3)  # the layer draws the same one
    factors = x, weight, lora_A, core, lora_B, None
    y = lorasb_linear(*factors, scaling=0.5, dropout=0.2, backend=backend)
    found = y, *torch.autograd.grad(y, (x, core), dy)
    expected = formulas.exact(formulas.lorasb_linear, *factors, dy, 0.5, 0.2, seed)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-4, atol=1e-4)
