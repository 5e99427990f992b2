"""A block's multiple and a training step: sums of their launches, and in the order they must be."""

import pytest
import torch

from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.profiling.block_time import (
    adapted_launches,
    frozen_launches,
    multiple,
    seconds,
    training_tokens_per_second,
)
from lorasb_kernels.profiling.layer_time import ROUTES, expand, routes_of
from lorasb_kernels.profiling.prediction import floor
from lorasb_kernels.profiling.roofline import datasheet_ceilings
from lorasb_kernels.profiling.shapes import PRESETS

MISTRAL = PRESETS["mistral-7b"].groups


@pytest.mark.parametrize("key", ["a6000", "a100", "h100", "rtx4090", "rtx5090"])
@pytest.mark.parametrize("M", [256, 8192])
def test_the_roofline_stays_the_floor(key, M):
    gpu = GPUS[key]
    ceilings = datasheet_ceilings(gpu, "bfloat16")
    for way, launches in (
        ("frozen", frozen_launches(gpu, MISTRAL, M)),
        ("fused", adapted_launches(gpu, MISTRAL, M, 96, "fused")),
        ("two_call", adapted_launches(gpu, MISTRAL, M, 96, "two_call")),
    ):
        layers = [layer for group in MISTRAL for layer in group]
        least = sum(floor(layer, M, 96, torch.bfloat16, ceilings, way) for layer in layers)
        # The 4090's clock passes its datasheet's, and small tensors stay in L2.
        assert seconds(launches) > 0.9 * least, way


@pytest.mark.parametrize("key", GPUS)
def test_an_adapter_costs_and_grouping_saves(key):
    gpu = GPUS[key]
    for M in (512, 8192):
        for route in routes_of(gpu):
            alone, grouped = (multiple(gpu, MISTRAL, M, 96, route, g) for g in (False, True))
            assert 1 < grouped < alone < 3
            assert multiple(gpu, MISTRAL, M, 16, route) < alone


def test_routes_of_hopper_alone():
    assert routes_of(GPUS["h100"]) == ROUTES
    assert {"dual", "fused_descriptor"}.isdisjoint(routes_of(GPUS["a6000"]))


def test_the_launches_of_a_layer_and_its_siblings():
    gpu = GPUS["a6000"]
    qkv = MISTRAL[:1]
    names = [launch.name for launch in adapted_launches(gpu, qkv, 8192, 96, "two_call")]
    assert names.count("projection") == 6
    assert names.count("two_call") == 6
    assert names.count("gradient") == 3
    assert names.count("add") == 2
    names = [launch.name for launch in adapted_launches(gpu, qkv, 8192, 96, "two_call", True)]
    assert names.count("projection") == 4
    assert names.count("two_call") == 4
    assert names.count("gemm") == 2
    launches = list(adapted_launches(gpu, qkv, 8192, 96, "two_call", True))
    assert expand(gpu, 8192, 4096, 4096, 3 * 96, True, "two_call") in launches
    assert names.count("add") == 0
    assert [launch.name for launch in frozen_launches(gpu, qkv, 8192)].count("add") == 2


def test_a_training_step_in_tokens_per_second():
    model = PRESETS["mistral-7b"]
    rates = {
        key: training_tokens_per_second(model, GPUS[key], r=96) for key in ("a6000", "a100", "h100")
    }
    assert rates["a6000"] < rates["a100"] < rates["h100"]
    parameters = sum(layer.n * layer.m for layer in model.layers) * model.blocks
    for key, rate in rates.items():
        gpu = GPUS[key]
        assert rate < gpu.rates.tensor / (4 * parameters)  # the linear layers alone, no adapter
        again = training_tokens_per_second(model, gpu, r=96, recompute=True)
        assert 0.6 * rate < again < 0.75 * rate
        assert training_tokens_per_second(model, gpu, r=96, sequence=8192) < rate
