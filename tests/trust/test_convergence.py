"""Training in 16 bits and by the fused kernels follows the float64 curve; LoRA-SB's theorems hold
on the way.

A student learns the effect of a random rank-4 update of its own layers, 200 steps of AdamW (ten in
Triton's interpreter). The models of a comparison start from the same bits: the 16-bit one is
made first and widened.
"""

import copy

import torch
from torch import nn

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.init import EstimationOptions
from lorasb_kernels.nn.linear import LoRASBLinear
from lorasb_kernels.targets import adapted_layers
from tests.ops.conftest import ON_GPU
from tests.ops.operands import same_bits

FEATURES, HIDDEN, RANK, SAMPLES = 24, 32, 8, 64
# Largest distance from that curve at any step, as a share of the initial loss: half the spacing
# of the dtype's numbers.
BAND = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}
BAND[torch.float32] = 1e-5  # other orders of summation, 200 steps of AdamW


def problem(dtype: torch.dtype, device: torch.device):
    """An adapted student in `dtype`, inputs and targets in fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES)
    student = nn.Sequential(*layers).to(dtype)
    teacher = copy.deepcopy(student).float()
    with torch.no_grad():
        for layer in (teacher[0], teacher[2]):
            m, n = layer.weight.shape
            layer.weight += 0.1 * normal(m, 4) @ normal(4, n) / n**0.5
        x = normal(SAMPLES, FEATURES).to(dtype).float()
        y = teacher(x)

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch["x"].to(dtype)).float(), batch["y"])

    config = LoRASBConfig(r=RANK, target_modules=("0", "2"))
    adapt(
        student,
        config,
        [{"x": x, "y": y}],
        learning_rate=1e-3,
        estimation=EstimationOptions(loss_fn=loss_fn),
        progress=False,
    )
    return student.to(device), x.to(device), y.to(device)


class Plain(nn.Module):
    """The formula of an adapted layer in float64, differentiated by torch."""

    def __init__(self, layer: LoRASBLinear):
        super().__init__()
        for name in ("weight", "bias", "lora_A", "lora_B"):
            self.register_buffer(name, getattr(layer, name).detach().double())
        self.lora_R = nn.Parameter(layer.lora_R.detach().double())
        self.scaling = layer.scaling

    def forward(self, x):
        delta = self.scaling * self.lora_B @ self.lora_R @ self.lora_A
        return x @ (self.weight + delta).T + self.bias


def formula_of(student) -> nn.Sequential:
    """The student without the package's operations: the oracle of its training."""
    return nn.Sequential(
        *(Plain(layer) if isinstance(layer, LoRASBLinear) else layer for layer in student)
    )


def train(model, x, y, backend: str | None, steps: int, optimizer=torch.optim.AdamW, lr=3e-3):
    """The losses of `steps` steps; `backend` is None where the model is of `Plain` layers."""
    for layer in adapted_layers(model).values() if backend else ():
        layer.backend = backend
    dtype = model[0].weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x.to(dtype)).to(wide), y.to(wide))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def cores(model) -> torch.Tensor:
    found = [layer.lora_R for layer in model if isinstance(layer, (Plain, LoRASBLinear))]
    return torch.cat([core.detach().double().flatten() for core in found])


def test_the_curve_is_that_of_the_formula(backend, dtype, device):
    steps = 200 if backend == "reference" or ON_GPU else 10
    model, x, y = problem(dtype, device)
    exact, start = formula_of(model), cores(model)
    losses = train(model, x, y, backend, steps)
    expected = train(exact, x, y, None, steps)
    assert losses[-1] < (0.5 if steps == 200 else 0.97) * losses[0]
    assert (losses - expected).abs().max() <= BAND[dtype] * expected[0]
    moved = (cores(exact) - start).norm()
    if backend == "reference":
        assert (cores(model) - cores(exact)).norm() <= 4 * BAND[dtype] * moved
        return
    # By the contract: at most twice as far from it as eager PyTorch in the same dtype.
    eager, *_ = problem(dtype, device)
    train(eager, x, y, "reference", steps)
    own = (cores(eager) - cores(exact)).norm()
    assert (cores(model) - cores(exact)).norm() <= 2 * (own + BAND[dtype] * moved)


def test_theorems_on_the_way(device):
    """Small steps of plain gradient descent lower the loss each time (theorem 4); A and B stay
    orthonormal, and no frozen tensor changes a bit."""
    model, x, y = problem(torch.float32, device)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "lora_R" not in n}
    losses = train(model, x, y, "reference", 200, torch.optim.SGD, 0.05)
    assert (losses.diff() < 0).all()
    for layer in model:
        if isinstance(layer, LoRASBLinear):
            identity = torch.eye(RANK, device=device)
            for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
                torch.testing.assert_close(gram, identity, rtol=0, atol=1e-5)
    assert all(same_bits(t, model.state_dict()[n]) for n, t in frozen.items())


def test_a_core_in_bf16_would_leave_the_curve(device):
    """The band is tight enough to detect small updates lost by rounding the core each step."""
    model, x, y = problem(torch.float32, device)
    exact = copy.deepcopy(model)

    class Rounding(torch.optim.AdamW):
        def step(self):
            super().step()
            with torch.no_grad():
                for core in self.param_groups[0]["params"]:
                    core.copy_(core.bfloat16())

    losses = train(model, x, y, "reference", 200, Rounding, lr=3e-4)
    expected = train(exact, x, y, "reference", 200, lr=3e-4)
    assert (losses - expected).abs().max() > 4 * BAND[torch.bfloat16] * expected[0]
