"""`CapturedStep` in real CUDA graphs: the gradients of eager steps; masks that differ."""

import copy

import pytest
import torch

from lorasb_kernels.nn import LoRASBLinear
from lorasb_kernels.optim import CapturedStep

n, M = 256, 64


def squared_error(model, batch):
    return (model(batch["x"]).float() - batch["y"]).square().mean()


def model_and_batches(backend, device, dropout=0.0):
    torch.manual_seed(0)
    options = {"dropout": dropout, "backend": backend, "device": device, "dtype": torch.bfloat16}
    layers = [LoRASBLinear(n, n, 24, **options) for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_R.normal_(std=0.3)
    batches = [
        {"x": torch.randn(M, n).to(device, torch.bfloat16), "y": torch.randn(M, n).to(device)}
        for _ in range(4)
    ]
    return torch.nn.Sequential(*layers), batches


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_steps_equal_eager_steps(backend, device):
    model, batches = model_and_batches(backend, device)
    twin = copy.deepcopy(model)
    step = CapturedStep(model, batches[0], loss=squared_error, max_grad_norm=0.5)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    for micro_batches in (batches[:2], batches[2:], batches[1:]):
        twin.zero_grad()
        for batch in micro_batches:
            (squared_error(twin, batch) / len(micro_batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        _, found = step(micro_batches)
        torch.testing.assert_close(found, norm, rtol=1e-3, atol=1e-5)
        for ours, eager in zip(gradients(model), gradients(twin), strict=True):
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_every_replay_draws_its_own_mask(backend, device):
    model, batches = model_and_batches(backend, device, dropout=0.5)
    step = CapturedStep(model, batches[0], loss=squared_error)
    found = []
    for seed in (3, None, 3):
        if seed is not None:
            torch.manual_seed(seed)
        step(batches[:1])
        found.append(gradients(model))
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_a_loss_that_waits_for_the_device_is_refused(device):
    model, batches = model_and_batches("reference", device)

    def waits(model, batch):
        loss = squared_error(model, batch)
        return loss if loss.item() > 0 else -loss

    with pytest.raises(RuntimeError, match="the step cannot be captured as a CUDA graph"):
        CapturedStep(model, batches[0], loss=waits)
