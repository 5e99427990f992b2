"""`lorasb plan`: memory held against what is allocated, and what follows from it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.cli.main import main
from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.init.predict import Rates
from lorasb_kernels.profiling.plan import Work, hours, init_memory, options, usable
from lorasb_kernels.profiling.prediction import preset_of
from lorasb_kernels.profiling.shapes import PRESETS, Preset, encoder
from lorasb_kernels.profiling.step_memory import PRECISIONS, block_activations, step_memory
from lorasb_kernels.train.loss import token_losses

A6000, MISTRAL = GPUS["a6000"], PRESETS["mistral-7b"]
BF16, FP32, NF4 = PRECISIONS


def allocated(work: Callable[[], None]) -> int:
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


def step_of(model, r: int, batch: int, length: int, recompute: bool) -> Callable[[], None]:
    """A training step as the trainer runs it, after a first one that makes Adam's state."""
    adapt(model, LoRASBConfig(r=r, target_modules="all-linear", init="orthogonal"))
    if recompute:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(3, 3 + length).repeat(batch, 1)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def step():
        losses, _ = token_losses(model, inputs)
        losses.mean().backward()
        del losses
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    return step


def beyond_the_model(memory) -> int:
    return memory.kept + memory.backward


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", [BF16, FP32], ids=lambda p: p.name)
@pytest.mark.parametrize("vocabulary", [256, 2048])
def test_a_step_allocates_what_is_predicted(precision, recompute, vocabulary, tmp_path):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config).to(getattr(torch, precision.dtype))
    measured = allocated(step_of(model, 4, 8, 64, recompute))
    memory = step_memory(preset_of(str(tmp_path)), precision, r=4, tokens=512, recompute=recompute)
    assert beyond_the_model(memory) == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_smollm2_allocates_what_is_predicted(recompute):
    from lorasb_kernels.train.demo.assets import smollm2

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    measured = allocated(step_of(model, 16, 4, 128, recompute))
    memory = step_memory(preset_of(str(folder)), FP32, r=16, tokens=512, recompute=recompute)
    assert memory.weights == pytest.approx(weights, rel=0.01)
    assert beyond_the_model(memory) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("precision", [BF16, FP32], ids=lambda p: p.name)
def test_a_bert_keeps_what_is_predicted(precision):
    preset = Preset("", encoder(96, 384), 3, 64)
    config = BertConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_probs_dropout_prob=0.0,  # the CPU's fused attention has no dropout,
        hidden_dropout_prob=0.0,  # and its masks are wider than a GPU's
    )
    model = BertModel(config, add_pooling_layer=False).to(getattr(torch, precision.dtype))
    adapt(model, LoRASBConfig(r=4, target_modules="all-linear", init="orthogonal"))
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(torch.arange(64).repeat(8, 1)).last_hidden_state
    assert output.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    masks = 2 * 96
    predicted = 3 * 8 * 64 * (block_activations(preset, precision, 4) - masks)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_frozen_weights_are_those_of_the_model(tmp_path):
    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        config.save_pretrained(tmp_path)
        model = LlamaForCausalLM(config)
        norms = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
        weights = sum(p.nbytes for p in model.parameters()) - norms
        assert step_memory(preset_of(str(tmp_path)), FP32, r=4, tokens=1).weights == weights


def test_the_largest_batch_is_the_last_that_fits():
    for one in options(MISTRAL, A6000, Work()):
        batches = (one.largest, one.largest + 1)
        fits = []
        for batch in batches:
            tokens = batch * 512
            step = step_memory(MISTRAL, one.precision, r=96, tokens=tokens, recompute=one.recompute)
            init = init_memory(MISTRAL, A6000, one.precision, Work(), batch)
            fits.append(max(step.total, init.total) <= usable(A6000))
        assert fits == [True, False], one.name
        assert one.fits == (one.largest >= 16)


def test_what_takes_longer_and_what_takes_more():
    found = {one.name: one for one in options(MISTRAL, A6000, Work())}
    speed = {name: one.tokens_per_second for name, one in found.items()}
    assert speed["fp32"] == pytest.approx(speed["bf16"] * A6000.fp32_rate / A6000.tensor_rate)
    assert speed["4-bit"] < speed["bf16"]
    assert speed["4-bit"] - speed["4-bit, checkpointed"] > 0
    for precision in ("bf16", "fp32", "4-bit"):
        again = f"{precision}, checkpointed"
        assert speed[again] < speed[precision]
        assert found[again].training.total < found[precision].training.total
        assert found[again].largest > found[precision].largest
    assert found["4-bit"].training.total < found["bf16"].training.total
    assert hours(Work(rows=7200, length=512), 1024) == 1


def test_a_larger_device_keeps_all_sums():
    small = init_memory(MISTRAL, A6000, BF16, Work(), 16)
    large = init_memory(MISTRAL, replace(A6000, memory_gb=200), BF16, Work(), 16)
    assert (small.strategy, large.strategy) == ("layerwise", "resident")
    weights = MISTRAL.blocks * sum(layer.n * layer.m for layer in MISTRAL.layers)
    assert large.sums == 4 * weights


def test_inputs_of_blocks_go_to_the_host_beyond_the_budget():
    many = Work(samples=4000)
    memory = init_memory(MISTRAL, A6000, BF16, many, 16)
    assert memory.sums + memory.boundaries <= usable(A6000) // 2


def test_rates_are_those_of_the_gpu():
    half, single = (Rates.of(A6000, dtype) for dtype in ("bfloat16", "float32"))
    assert half.flops == pytest.approx(A6000.rates.tensor)
    assert single.flops == pytest.approx(half.flops * A6000.fp32_rate / A6000.tensor_rate)
    assert half.svd == single.svd


def test_the_two_lines_that_matter_come_first_within_80_columns(capsys):
    cases = [(model, "a6000", "96") for model in PRESETS] + [("tiny", gpu, "4") for gpu in GPUS]
    for model, gpu, rank in cases:
        assert main(["plan", "--model", model, "--gpu", gpu, "--rank", rank]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith("PREDICTION: ") for line in lines[:2])
        assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_what_fits_is_said_with_speed_and_hours(capsys):
    command = ["plan", "--model", "mistral-7b", "--gpu"]
    assert main([*command, "a6000", "--rows", "395000"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("PREDICTION: fits: bf16, checkpointed, ")
    assert "tokens/s" in second
    assert "h an epoch of 395,000 rows" in second
    assert main([*command, "4090", "--batch-size", "1000"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("PREDICTION: does not fit: 4-bit, checkpointed, ")
    assert "rows of 512 tokens fit" in second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "600"], "rank is 600; expected 1 <= rank <= 512"),
        (["--rank", "0"], "rank is 0; expected 1 <= rank <= 512"),
        (["--gpu", "abacus"], "gpu is 'abacus'; expected one of a6000"),
        (["--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["--max-length", "-1"], "--max-length is -1; expected at least 1"),
        (["--rows", "0"], "--rows is 0; expected at least 1"),
        (["--init-rows", "0"], "--init-rows is 0; expected at least 1"),
        (["--model", "/nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(flags, message, capsys):
    assert main(["plan", "--model", "mistral-7b", "--gpu", "a6000", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_planned_without_weights(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpu", "4090"]) == 0
    assert "PREDICTION: fits: bf16, " in capsys.readouterr().out
