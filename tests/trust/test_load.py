"""Long runs, many cycles and threads change neither memory nor results."""

import gc
import resource
import threading

import pytest
import torch

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.functional import lorasb_linear
from lorasb_kernels.targets import adapted_layers
from tests.models import batches, build
from tests.ops.operands import normal, same_bits
from tests.trust.conftest import amounts

CPU = torch.device("cpu")


def adapted(**fields):
    config = LoRASBConfig(**{"r": 4, "init": "orthogonal", **fields})
    model = adapt(build("llama"), config, progress=False)
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(model).values()):
            layer.lora_R.copy_(normal(4, 4, dtype=torch.float32, device=CPU, seed=i))
    return model


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@amounts(500, 10_000)
def test_memory_stays_flat(cases):
    model = adapted(share_inputs=True, dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = batches("llama")[0]

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        gc.collect()
        return resident_megabytes(), len(gc.get_objects())

    steps(cases // 10)
    before, objects = steps(cases // 10)
    after, objects_after = steps(cases - 2 * (cases // 10))
    assert objects_after - objects <= 100
    assert after - before <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_thousand_merges_bring_back_the_weights(dtype):
    layers = adapted_layers(adapted().to(dtype))
    originals = {name: layer.weight.clone() for name, layer in layers.items()}
    for cycle in range(1000):
        for name, layer in list(layers.items())[cycle % 2 :: 7]:
            layer.merge(keep_original=True)
            assert not same_bits(layer.weight, originals[name])
            layer.unmerge()
            assert same_bits(layer.weight, originals[name])
    name, layer = next(iter(layers.items()))
    merged = originals[name].double() + layer.get_delta_weight().double()
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    size = torch.maximum(originals[name].abs().double(), merged.abs())
    error = (layer.weight.double() - originals[name].double()).abs()
    assert (error <= torch.finfo(dtype).eps * size).all(), "more than one rounding"


def in_threads(work, count: int = 4) -> list:
    """`work(i)` in as many threads at once; their results."""
    results, start = [None] * count, threading.Barrier(count)

    def run(i):
        start.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("backend", ["reference"])
def test_threads_give_the_results_of_one(backend):
    operands = [normal(*shape, dtype=torch.float32, device=CPU) for shape in ((40, 70), (8, 70))]
    B = normal(40, 8, dtype=torch.float32, device=CPU)

    def work(i):
        outcomes = []
        for repeat in range(20):
            x = normal(9, 70, dtype=torch.float32, device=CPU, seed=i + repeat).requires_grad_()
            R = normal(8, 8, dtype=torch.float32, device=CPU, seed=i).requires_grad_()
            y = lorasb_linear(x, *operands, R, B, backend=backend)
            outcomes += [y.detach(), *torch.autograd.grad(y.sum(), (x, R))]
        return outcomes

    alone = [work(i) for i in range(4)]
    for one, other in zip(alone, in_threads(work), strict=True):
        assert all(map(same_bits, one, other))


@pytest.mark.parametrize("grad", [False, True])
def test_one_model_with_shared_inputs_serves_several_threads(grad):
    """Siblings that another thread overtakes compute their own outputs."""
    model = adapted(share_inputs=True)
    batch = batches("llama", count=4, seed=3)

    def work(i):
        with torch.set_grad_enabled(grad):
            return [model(**batch[i]).logits.detach() for _ in range(15)]

    alone = [work(i)[0] for i in range(4)]
    for expected, found in zip(alone, in_threads(work), strict=True):
        assert all(torch.equal(expected, logits) for logits in found)


def test_threads_on_the_same_tensor():
    """All layers of a group on one tensor: the first thread takes the outputs."""
    layers = list(adapted_layers(adapted(share_inputs=True)).values())[:3]
    x = normal(5, 32, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]

    def work(_):
        with torch.no_grad():
            return [layer(x) for _ in range(200) for layer in layers]

    for found in in_threads(work):
        assert all(torch.equal(y, expected[i % 3]) for i, y in enumerate(found))
