"""The report of an initialization, and its prediction."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.init import EstimationOptions, InitReport, estimate_updates, predict_init
from lorasb_kernels.init.predict import Rates
from tests.init.models import VOCABULARY, Stack, batches_for, linear_names, llama

RATES = Rates(flops=1e9, svd=1e-9)


@pytest.fixture(scope="module")
def report():
    model = adapt(
        llama(),
        LoRASBConfig(r=4),
        batches_for("llama"),
        learning_rate=1e-3,
        progress=False,
    )
    return InitReport.of(model)


def test_report_holds_every_layer_as_it_is(report):
    model = llama()
    assert sorted(report.layers) == sorted(linear_names(model))
    for name, layer in report.layers.items():
        weight = model.get_submodule(name).weight
        assert layer.shape == tuple(weight.shape)
        assert layer.r == 4
        assert layer.zeros == 0
        assert 4 / min(weight.shape) < layer.captured_energy < 1
        leading = sum(value**2 for value in layer.singular_values) / weight.numel()
        assert 0.5 * layer.captured_energy < leading <= layer.captured_energy
        assert layer.seconds > 0


def test_table_names_each_layer_and_the_least(report):
    text = str(report)
    assert all(name in text for name in report.layers)
    least = min(report.layers, key=lambda name: report.layers[name].captured_energy)
    assert f"({least})" in text.splitlines()[-1]
    assert "21 layers" in text.splitlines()[-1]


def test_report_is_written_and_drawn(report, tmp_path):
    report.save(tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded.keys() == report.layers.keys()
    assert report._energy_by_kind()["q_proj"] == [
        report.layers[f"model.layers.{i}.self_attn.q_proj"].captured_energy for i in range(3)
    ]
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_model_without_a_report():
    with pytest.raises(ValueError, match="model holds no initialization report"):
        InitReport.of(Stack())


def predict(model, **changes):
    settings = {"r": 4, "samples": 10, "tokens": 20, "micro_batch": 2, "rates": RATES}
    return predict_init(model, linear_names(model), **settings | changes)


def test_prediction_counts_accumulators_and_boundaries():
    with torch.device("meta"):
        model = llama()
    resident, layerwise = predict(model).strategies
    weights = sum(model.get_submodule(name).weight.numel() for name in linear_names(model))
    assert resident.accumulators == 4 * weights
    assert layerwise.accumulators == 4 * weights // 3
    assert layerwise.boundaries == 10 * 20 * 32 * 4 * 3
    assert resident.boundaries == 0
    assert layerwise.activations < resident.activations
    assert layerwise.total == sum(
        (layerwise.accumulators, layerwise.boundaries, layerwise.activations)
    )


def test_prediction_counts_one_more_forward_for_layerwise():
    model = llama()
    resident, layerwise = predict(model).strategies
    head = VOCABULARY * 32
    weights = sum(model.get_submodule(name).weight.numel() for name in linear_names(model))
    passes = 2 * 200 * (3 * weights + 2 * head) / 1e9
    svd = 1e-9 * 4 * weights
    assert resident.seconds == pytest.approx(passes + svd)
    assert layerwise.seconds - resident.seconds == pytest.approx(2 * 200 * (weights + head) / 1e9)


def peak_bytes(work) -> int:
    """Peak bytes of live tensors, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    level = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        level += change.nbytes()
        peak = max(peak, level)
    return peak


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_predicted_peak_is_within_a_factor_of_two_of_the_measured(strategy):
    model = llama(hidden_size=96, intermediate_size=256, head_dim=24, num_hidden_layers=4)
    ids = torch.arange(3, 35).repeat(16, 1)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    names = linear_names(model)

    def estimate():
        for _ in estimate_updates(model, batches, names, EstimationOptions(strategy=strategy)):
            pass

    estimate()  # allocations that are made only once
    prediction = predict(model, samples=16, tokens=32, micro_batch=4)
    predicted = {s.strategy: s.total for s in prediction.strategies}[strategy]
    assert predicted / 2 <= peak_bytes(estimate) <= 2 * predicted


def test_prediction_of_the_published_procedure_and_table():
    model = llama()
    prediction = predict(model)
    assert prediction.published_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert "21 target layers" in str(prediction)
    assert "layerwise" in str(prediction)


def test_model_without_blocks_has_no_layerwise_prediction():
    prediction = predict_init(
        Stack(), ["before"], r=4, samples=10, tokens=1, micro_batch=2, rates=RATES
    )
    assert [s.strategy for s in prediction.strategies] == ["resident"]


def test_rates_are_measured():
    rates = Rates.measure("cpu", torch.float32, 8)
    assert 1e8 < rates.flops < 1e13
    assert 0 < rates.svd < 1e-5
