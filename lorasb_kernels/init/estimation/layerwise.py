"""Strategy `layerwise`: the accumulators of one block at a time, from the last to the first.

Each micro-batch runs forward once. Every block stores its inputs in a `BlockCall` and keeps no
activations; its outputs become new roots of the graph, so the backward pass from the loss stops at
the last block. Then the calls are replayed from the last to the first, each for all micro-batches:
forward with gradients, backward from the gradients that later calls produced, input gradients
passed on to earlier calls. After the replay of a block's first call its sums are complete and are
returned to the caller before the next block starts.

Memory: one block's accumulators and activations, and the inputs of all blocks. Work: one
forward, and one recomputed forward and backward. Exact: what lies between blocks (an
encoder's last norm, cross-attention, a classifier) stays in the graph and takes part.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch

from lorasb_kernels.init.estimation.block_call import BlockCall
from lorasb_kernels.init.estimation.blocks import find_blocks
from lorasb_kernels.init.estimation.boundary_store import BoundaryStore
from lorasb_kernels.init.estimation.frozen_eval import replaced_forward
from lorasb_kernels.init.estimation.memory import accumulator_bytes, release_free_memory
from lorasb_kernels.init.estimation.ranks import FallBack
from lorasb_kernels.init.estimation.sums import Estimation


def layerwise(
    estimation: Estimation, names: list[str], budget: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each of `names` with its summed gradient, layers of the last block first.

    Args:
        estimation: what to estimate.
        names: the layers.
        budget: bytes for a block's accumulators and, on a GPU, block inputs; inputs beyond
            it are kept in host memory. None for no limit.

    Raises:
        FallBack: blocks that cannot be run alone, or not within the budget.
    """
    blocks = find_blocks(estimation.model, names)
    layers_of = {
        block: [name for name in names if f"{name}.".startswith(f"{block}.")] for block in blocks
    }
    store = BoundaryStore(_boundary_budget(estimation, names, layers_of, budget))
    bar = estimation.bar(len(estimation.batches) * (1 + len(blocks)), "layerwise")
    try:
        with estimation.step(names):
            tapes = []
            for index in range(len(estimation.batches)):
                tapes.append(_record(estimation, blocks, index, store))
                release_free_memory(estimation.device)
                bar.update()
            order = _common_order(tapes)
        pending = list(names)
        for position in reversed(range(len(order))):
            release_free_memory(estimation.device)
            with estimation.step(names):
                _replay([tape.pop() for tape in tapes], estimation.device, bar)
            if order[position] in order[:position]:
                continue
            for name in layers_of[order[position]]:
                pending.remove(name)
                yield name, estimation.finish(name)
        for name in pending:
            yield name, estimation.finish(name)
    finally:
        bar.close()


def _boundary_budget(estimation, names, layers_of, budget) -> int | None:
    """What `budget` leaves for block inputs, after the accumulators held at one time."""
    if not layers_of:
        raise FallBack("no list of blocks contains the target layers")
    if budget is None:
        return None
    size = {name: accumulator_bytes(estimation.layers[name]) for name in names}
    in_blocks = {block: sum(size[name] for name in inside) for block, inside in layers_of.items()}
    needed = max(in_blocks.values()) + sum(size.values()) - sum(in_blocks.values())
    if needed > budget:
        raise FallBack(f"accumulators take {needed} bytes at a time, the budget is {budget}")
    return budget - needed


def _record(estimation, blocks, index, store) -> list[BlockCall]:
    """Runs micro-batch `index` forward, and backward to the last block's outputs."""
    tape: list[BlockCall] = []
    with ExitStack() as stack:
        for name, block in blocks.items():
            forward = partial(_recorded_forward, name, block.forward, tape, store)
            stack.enter_context(replaced_forward(block, forward))
        loss = estimation.loss(index)
    # Graphs between blocks are used again whenever a later block produces gradients.
    loss.backward(retain_graph=True)
    store.forget()
    return tape


def _recorded_forward(name, forward, tape, store, *args, **kwargs):
    if not torch.is_grad_enabled():
        raise FallBack(f"block {name} is run with gradients off")
    call = BlockCall(name, forward, args, kwargs, store)
    tape.append(call)
    return call.first_run(args, kwargs)


def _common_order(tapes: list[list[BlockCall]]) -> list[str]:
    orders = {tuple(call.name for call in tape) for tape in tapes}
    if len(orders) > 1:
        raise FallBack("batches run through different sequences of blocks")
    return list(orders.pop())


def _replay(calls: list[BlockCall], device: torch.device, bar) -> None:
    calls[0].prefetch()
    norms = []
    while calls:
        call = calls.pop(0)
        if calls:
            calls[0].prefetch()
        norms += call.replay()
        release_free_memory(device)
        bar.update()
    first, again = torch.tensor([(a.item(), b.item()) for a, b in norms]).reshape(-1, 2).T
    if not torch.allclose(first, again, rtol=1e-5, atol=0, equal_nan=True):
        raise FallBack(f"block {call.name} gave another output when it was run alone")


__all__ = ["layerwise"]
