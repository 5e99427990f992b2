"""Initialization of a few blocks of SmolLM2-135M, timed: `pytest -p benchmark bench/test_init.py`.

Peak memory and the whole model are measured in fresh processes by `python -m bench.init_cost`.
"""

import pytest
import torch

from bench.contenders_init import CONTENDERS
from bench.init_process import headline_batches, load
from lorasb_kernels.targets import find_targets

BLOCKS, SAMPLES, MICRO_BATCH, RANK = 4, 16, 4, 16


@pytest.fixture(scope="module")
def setting():
    model = load(BLOCKS, torch.float32)
    return model, headline_batches(SAMPLES, MICRO_BATCH), list(find_targets(model, "all-linear"))


@pytest.mark.benchmark(group="init")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_init(benchmark, setting, contender):
    model, batches, targets = setting
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    benchmark.extra_info |= {"blocks": BLOCKS, "samples": SAMPLES, "tokens": tokens, "r": RANK}
    benchmark.pedantic(
        CONTENDERS[contender],
        args=(model, batches, targets, RANK, 1e-4),
        rounds=3,
        warmup_rounds=1,
    )
