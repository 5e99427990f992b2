"""What `CapturedStep` does around its graphs, run without them; its errors. Graphs: tests/gpu."""

import copy

import pytest
import torch
from torch import nn

from lorasb_kernels.nn import LoRALinear, LoRASBLinear
from lorasb_kernels.optim import CapturedStep, captured_step

N = 12


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = LoRASBLinear(N, N, 4, dropout=dropout, scaling=0.5)
        self.second = LoRALinear(N, 3, 2, dropout=dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def batches(count, rows=5):
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(rows, size, generator=generator) for name, size in (("x", N), ("y", 3))}
        for _ in range(count)
    ]


@pytest.fixture
def without_graphs(monkeypatch):
    """Steps on the CPU: the work that would be captured is run before, and in every call."""

    def captured(self, work):
        captured_step.warm_up(work, self._buffers)
        return work

    monkeypatch.setattr(CapturedStep, "_captured", captured)
    monkeypatch.setattr(captured_step, "_common_device", lambda trained, batch: torch.device("cpu"))


def expected(model, micro_batches, max_grad_norm):
    """Loss, norm and gradients of a step in plain PyTorch."""
    model.zero_grad()
    total = 0.0
    for batch in micro_batches:
        loss = squared_error(model, batch) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = None if max_grad_norm is None else nn.utils.clip_grad_norm_(trained, max_grad_norm)
    return total, norm, [p.grad.clone() for p in trained]


@pytest.mark.parametrize("max_grad_norm", [None, 0.01, 100.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_that_of_plain_pytorch(without_graphs, max_grad_norm, dropout):
    model = Model(dropout)
    twin = copy.deepcopy(model)
    options = {"loss": squared_error, "max_grad_norm": max_grad_norm}
    step = CapturedStep(model, batches(1)[0], **options)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    data = batches(6)
    for micro_batches in (data[:3], data[3:4], data[4:]):
        torch.manual_seed(7)
        loss, norm, gradients = expected(twin, micro_batches, max_grad_norm)
        torch.manual_seed(7)
        found_loss, found_norm = step(micro_batches)
        torch.testing.assert_close(found_loss, loss)
        assert (norm is None) == (found_norm is None)
        if norm is not None:
            torch.testing.assert_close(found_norm, norm)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close([p.grad for p in trained], gradients)
        # The tensors that graphs write to, also after `zero_grad()` has dropped them.
        assert all(p.grad is own for p, own in zip(trained, step._gradients, strict=True))
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad()  # drops the gradients that a graph writes to
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_the_capture_leaves_no_gradients(without_graphs):
    """An optimizer that steps before the first call of the step changes nothing by them."""
    model = Model()
    CapturedStep(model, batches(1)[0], loss=squared_error, max_grad_norm=0.5)
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


class Normalized(Model):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(N).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_the_passes_before_the_capture_leave_no_trace_in_buffers(without_graphs):
    model = Normalized()
    twin, before = copy.deepcopy(model), copy.deepcopy(dict(model.named_buffers()))
    step = CapturedStep(model, batches(1)[0], loss=squared_error, max_grad_norm=1.0)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    data = batches(3)
    step(data)
    expected(twin, data, 1.0)
    assert model.norm.num_batches_tracked == 3
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_buffers_have_their_values_also_when_a_pass_fails():
    buffer = torch.zeros(2)

    def work():
        buffer.add_(1)
        raise RuntimeError("it waits for the device")

    with pytest.raises(RuntimeError, match="it waits"):
        captured_step.warm_up(work, [buffer])
    assert not buffer.any()


def test_a_batch_that_was_not_captured_is_named(without_graphs):
    step = CapturedStep(Model(), batches(1)[0], loss=squared_error)
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(6, 12\); .*\(5, 12\)"):
        step(batches(1, rows=6))
    good = batches(1)[0]
    with pytest.raises(ValueError, match=r"y is torch.float64 of"):
        step([good | {"y": good["y"].double()}])
    with pytest.raises(ValueError, match=r"a batch has \['x'\]; expected \['x', 'y'\]"):
        step([{"x": good["x"]}])
    with pytest.raises(ValueError, match="micro_batches is empty"):
        step([])


def test_what_cannot_be_captured_says_so():
    batch = batches(1)[0]
    with pytest.raises(RuntimeError, match="model is on cpu; expected a CUDA device"):
        CapturedStep(Model(), batch)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        CapturedStep(Model().requires_grad_(False), batch)
    with pytest.raises(TypeError, match="y is a list"):
        CapturedStep(Model(), batch | {"y": [1.0]})
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"max_grad_norm is (0\.0|-1\.0|nan); expected"):
            CapturedStep(Model(), batch, max_grad_norm=limit)


def test_gradient_checkpointing_is_refused(without_graphs):
    model = Model()
    model.first.gradient_checkpointing = True  # as transformers marks its blocks
    with pytest.raises(RuntimeError, match="checkpointing is on in first; expected it off"):
        CapturedStep(model, batches(1)[0], loss=squared_error)
    model.eval()
    CapturedStep(model, batches(1)[0], loss=squared_error)
