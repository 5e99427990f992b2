"""Three strategies, one result; each within its stated memory and work."""

import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.init import EstimationOptions, estimate_updates
from lorasb_kernels.init.estimation import api as estimate_module
from lorasb_kernels.init.estimation import boundary_store
from lorasb_kernels.init.estimation.gradient_sums import GradientSums
from lorasb_kernels.targets import adapted_layers
from tests.init.models import (
    FAMILIES,
    Stack,
    batches_for,
    linear_names,
    llama,
    stack_batches,
    stack_loss,
)

# Fits the accumulators of only a few layers of the tiny models.
SMALL_BUDGET = 16_000


def signs(model, batches, names, strategy, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dict(
            estimate_updates(model, batches, names, EstimationOptions(strategy=strategy, **options))
        )


def assert_same_signs(model, batches, names, **options):
    wanted = signs(model, batches, names, "resident", **options)
    assert set(wanted) == set(names)
    assert any(matrix.zeros() < matrix.shape.numel() for matrix in wanted.values())
    for strategy, budget in (("layerwise", None), ("grouped", SMALL_BUDGET)):
        found = signs(model, batches, names, strategy, memory_budget=budget, **options)
        assert set(found) == set(names)
        for name in names:
            assert torch.equal(found[name].positive, wanted[name].positive), (strategy, name)
            assert torch.equal(found[name].negative, wanted[name].negative), (strategy, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_give_the_same_signs(family):
    model = FAMILIES[family]()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert_same_signs(model, batches_for(family), names)


def _blocks(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated")
@pytest.mark.parametrize(
    ("family", "reentrant"),
    [
        *[("llama", True), ("llama", False), ("t5", True), ("t5", False)],
        *[("gemma2", False), ("roberta", False)],
    ],
)
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model = FAMILIES[family]()
    names = linear_names(model)
    batches = batches_for(family)
    wanted = signs(model, batches, names, "resident")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for strategy in ("resident", "layerwise", "grouped"):
        assert signs(model, batches, names, strategy) == wanted, strategy
    assert all(layer.gradient_checkpointing for layer in _blocks(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated")
def test_resident_checkpoints_blocks_if_the_model_does(monkeypatch):
    model = llama()
    calls = []
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    signs(model, batches_for("llama"), linear_names(model), "resident")
    assert len(calls) == 2 + 3  # two for the first sample, to compare its loss with the model's
    model.gradient_checkpointing_enable()
    calls.clear()
    signs(model, batches_for("llama"), linear_names(model), "resident")
    assert len(calls) == 2 + 6


def test_bfloat16_gives_the_same_signs():
    model = llama().bfloat16()
    assert_same_signs(model, batches_for("llama"), linear_names(model))


def test_custom_loss_and_layers_outside_the_blocks():
    model = Stack()
    names = linear_names(model)
    assert {"before", "after"} < set(names)
    assert_same_signs(model, stack_batches(), names, loss_fn=stack_loss)


def test_custom_loss_of_a_language_model():
    """A loss over all logits, and not the mean over a sample's labels."""

    def confidence(model, batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return (model(**inputs).logits.logsumexp(-1) * batch["attention_mask"]).sum(1)

    model = llama()
    assert_same_signs(model, batches_for("llama"), linear_names(model), loss_fn=confidence)


def test_targets_in_the_last_block_only():
    model = llama()
    names = [name for name in linear_names(model) if ".2." in name]
    assert_same_signs(model, batches_for("llama"), names)


def test_loss_that_runs_the_model_twice():
    model = Stack()

    def consistency(model, batch):
        return (model(batch) - 0.5 * model(batch + 1)).square().squeeze(1)

    assert_same_signs(model, stack_batches(), linear_names(model), loss_fn=consistency)


def test_block_that_is_used_twice():
    model = Stack()
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[1], model.blocks[0]])
    assert_same_signs(model, stack_batches(), linear_names(model), loss_fn=stack_loss)


class _Accumulators:
    """Records how many bytes of accumulators exist at a time."""

    def __init__(self, monkeypatch):
        self.peak = 0
        allocate = GradientSums.allocate

        def watched(sums, names):
            allocate(sums, names)
            self.peak = max(self.peak, sum(total.nbytes for total in sums._sums.values()))

        monkeypatch.setattr(GradientSums, "allocate", watched)


def test_accumulators_at_a_time(monkeypatch):
    model = llama()
    names = linear_names(model)
    of_all = sum(4 * model.get_submodule(name).weight.numel() for name in names)
    for strategy, budget, limit in [
        ("resident", None, of_all),
        ("layerwise", None, of_all // 3),
        ("grouped", SMALL_BUDGET, SMALL_BUDGET),
    ]:
        watch = _Accumulators(monkeypatch)
        for _ in estimate_updates(
            model,
            batches_for("llama"),
            names,
            EstimationOptions(strategy=strategy, memory_budget=budget),
        ):
            pass
        assert watch.peak <= limit, strategy
        assert strategy != "resident" or watch.peak == of_all


def test_layerwise_runs_each_block_twice_and_keeps_no_activations():
    model = Stack()
    runs = []
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: runs.append(1))
    batches = stack_batches()
    signs(model, batches, linear_names(model), "layerwise", loss_fn=stack_loss)
    assert len(runs) == 2 * len(model.blocks) * len(batches)


class SavesAnArray(torch.autograd.Function):
    """Identity that saves a tensor over a numpy array, whose lifetime can be observed."""

    @staticmethod
    def forward(ctx, x, alive):
        array = x.detach().numpy().copy()
        alive.add(array)
        ctx.save_for_backward(torch.from_numpy(array))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0 * ctx.saved_tensors[0], None


class Alive:
    """How many of the added arrays are still alive."""

    def __init__(self):
        self.references = []

    def add(self, array):
        self.references.append(weakref.ref(array))

    def count(self):
        return sum(reference() is not None for reference in self.references)


@pytest.mark.parametrize(("strategy", "most"), [("layerwise", 1), ("resident", 3)])
def test_activations_at_a_time(strategy, most):
    model = Stack()
    alive, peaks = Alive(), []
    for block in model.blocks:
        original = block.forward

        def forward(x, original=original):
            y = SavesAnArray.apply(original(x), alive)
            peaks.append(alive.count())
            return y

        block.forward = forward
    signs(model, stack_batches(), linear_names(model), strategy, loss_fn=stack_loss)
    assert max(peaks) == most
    assert alive.count() == 0


def test_block_inputs_beyond_the_budget_wait_in_host_memory(monkeypatch):
    """On the CPU with the same code, with streams that do nothing and memory that is not pinned."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(boundary_store, "_has_memory_of_its_own", lambda device: True)
    moved = []
    real = boundary_store.Offloaded
    monkeypatch.setattr(boundary_store, "Offloaded", lambda *a: moved.append(1) or real(*a))
    model = llama().to(device)
    names = linear_names(model)
    wanted = signs(model, batches_for("llama"), names, "layerwise")
    assert not moved
    one_block = sum(4 * model.get_submodule(n).weight.numel() for n in names if ".2." in n)
    found = signs(model, batches_for("llama"), names, "layerwise", memory_budget=one_block + 2048)
    assert moved
    assert found == wanted


def test_inputs_of_a_host_model_stay_whatever_the_budget(monkeypatch):
    monkeypatch.setattr(boundary_store, "Offloaded", lambda *_: pytest.fail("moved"))
    model = Stack()
    names = ["blocks.0.up", "blocks.1.up"]
    signs(model, stack_batches(), names, "layerwise", memory_budget=512, loss_fn=stack_loss)


def test_layerwise_skips_blocks_below_the_first_target():
    model = Stack()
    runs = []
    model.blocks[0].up.register_forward_hook(lambda *_: runs.append(1))
    names = ["blocks.1.up", "blocks.2.up"]
    signs(model, stack_batches(), names, "layerwise", loss_fn=stack_loss)
    assert len(runs) == 2


def test_layerwise_yields_last_block_first_and_model_is_whole_between():
    model = llama()
    order = []
    for name, _ in estimate_updates(
        model, batches_for("llama"), linear_names(model), EstimationOptions(strategy="layerwise")
    ):
        order.append(int(name.split(".")[2]))
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert order == sorted(order, reverse=True)


def chosen(monkeypatch, model, names, **options):
    taken = []
    for strategy in ("resident", "layerwise", "grouped"):
        real = getattr(estimate_module, strategy)

        def watched(*args, strategy=strategy, real=real):
            taken.append(strategy)
            return real(*args)

        monkeypatch.setattr(estimate_module, strategy, watched)
    dict(
        estimate_updates(
            model, stack_batches(), names, EstimationOptions(loss_fn=stack_loss, **options)
        )
    )
    return taken


def test_adapt_estimates_by_the_strategy_and_within_the_budget(monkeypatch):
    watch = _Accumulators(monkeypatch)
    for strategy, budget in (("grouped", SMALL_BUDGET), ("layerwise", 10 * SMALL_BUDGET)):
        watch.peak = 0
        model = llama()
        adapt(
            model,
            LoRASBConfig(r=4),
            batches_for("llama"),
            learning_rate=1e-3,
            estimation=EstimationOptions(strategy=strategy, memory_budget=budget),
            progress=False,
        )
        assert 0 < watch.peak <= budget
    layers = sum(4 * w.lora_A.shape[1] * w.lora_B.shape[0] for w in adapted_layers(model).values())
    assert watch.peak == layers // 3


def test_auto_takes_what_the_budget_allows(monkeypatch):
    model = Stack()
    names = [name for name in linear_names(model) if name.startswith("blocks")]
    everything = 3 * 2 * 4 * 8 * 16
    assert chosen(monkeypatch, model, names, memory_budget=everything) == ["resident"]
    assert chosen(monkeypatch, model, names, memory_budget=everything - 1) == ["layerwise"]
    assert chosen(monkeypatch, model, ["before", "after"], memory_budget=256) == ["grouped"]
    assert chosen(monkeypatch, model, names) == ["resident"]


def test_block_larger_than_the_budget_goes_to_grouped(monkeypatch):
    model = Stack()
    names = linear_names(model)
    with pytest.warns(UserWarning, match=r"'layerwise' gave up: accumulators take \d+ bytes"):
        taken = chosen(monkeypatch, model, names, memory_budget=512)
    assert taken == ["layerwise", "grouped"]


def test_out_of_memory_in_resident_is_retried_as_layerwise(monkeypatch):
    model = Stack()
    names = linear_names(model)
    wanted = dict(
        estimate_updates(model, stack_batches(), names, EstimationOptions(loss_fn=stack_loss))
    )
    allocate = GradientSums.allocate

    def limited(sums, names):
        allocate(sums, names)
        if len(sums._sums) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GradientSums, "allocate", limited)
    with pytest.warns(UserWarning, match="'resident' gave up: out of memory"):
        found = dict(
            estimate_updates(
                model,
                stack_batches(),
                names,
                EstimationOptions(loss_fn=stack_loss, strategy="resident"),
            )
        )
    assert found == wanted


class Stateful(Stack):
    """Blocks are scaled by what the model wrote into them for the current batch."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            original = block.forward
            block.forward = lambda x, block=block, original=original: original(x) * block.scale

    def forward(self, x):
        for block in self.blocks:
            block.scale = x.mean()
        return super().forward(x)


class Restless(Stack):
    """Blocks that draw random numbers also in eval mode."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            original = block.forward
            block.forward = lambda x, original=original: original(x) * torch.rand(())


def with_cache(model, batch):
    x = model.before(batch)
    for block in model.blocks:
        x = block(x, cache=object())
    return model.after(x).squeeze(1)


@dataclass
class Wrapped:
    value: torch.Tensor


def with_wrapped_outputs(model, batch):
    x = model.before(batch)
    for block in model.blocks:
        x = block(x, wrapped=True).value
    return model.after(x).squeeze(1)


def changed_in_place(model, batch):
    x, offset = model.before(batch), torch.zeros(())
    for block in model.blocks:
        x = block(x, offset)
        offset += 1
    return model.after(x).squeeze(1)


def varying_depth(model, batch):
    x = model.before(batch)
    for block in list(model.blocks)[: len(batch)]:
        x = block(x)
    return model.after(x).squeeze(1)


@pytest.mark.parametrize("kind", [Stateful, Restless])
def test_blocks_whose_output_hangs_on_more_than_inputs_fall_back_to_grouped(kind):
    model = kind()
    names = linear_names(model)
    wanted = signs(model, stack_batches(), names, "resident", loss_fn=stack_loss)
    with pytest.warns(UserWarning, match="'layerwise' gave up: block blocks.2 gave another output"):
        found = dict(
            estimate_updates(
                model,
                stack_batches(),
                names,
                EstimationOptions(strategy="layerwise", loss_fn=stack_loss),
            )
        )
    assert found == wanted


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (with_cache, "block blocks.0 takes an object, a object"),
        (with_wrapped_outputs, "block blocks.0 returns an object, a Wrapped"),
        (changed_in_place, "an input of block blocks.2 was changed in place"),
        (varying_depth, "batches run through different sequences of blocks"),
    ],
)
def test_blocks_that_cannot_be_run_alone_fall_back_to_grouped(loss, reason):
    model = Stack()
    for block in model.blocks:
        original = block.forward

        def forward(x, offset=0, cache=None, wrapped=False, original=original):
            y = original(x + offset)
            return Wrapped(y) if wrapped else y

        block.forward = forward
    names = linear_names(model)
    wanted = signs(model, stack_batches(), names, "resident", loss_fn=loss)
    with pytest.warns(UserWarning, match=f"'layerwise' gave up: {reason}; using 'grouped'"):
        found = dict(
            estimate_updates(
                model, stack_batches(), names, EstimationOptions(strategy="layerwise", loss_fn=loss)
            )
        )
    assert found == wanted


def test_compiled_model_is_run_eagerly():
    model = torch.compile(Stack(), backend="eager").eval()
    batches = stack_batches()
    model(batches[0])
    names = linear_names(model)
    assert all(name.startswith("_orig_mod.") for name in names)
    found = signs(model, batches, names, "resident", loss_fn=stack_loss)
    wanted = signs(Stack(), batches, linear_names(Stack()), "resident", loss_fn=stack_loss)
    assert {name: found[f"_orig_mod.{name}"] for name in wanted} == wanted
