"""`lorasb describe`: the parameters and multiply-accumulates of the papers' tables, by command."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lorasb_kernels import LoRASBConfig, adapt, describe
from lorasb_kernels.cli.main import main
from tests.models import build

GLUE = ("query", "value", "attention.output.dense", "output.dense")


@pytest.fixture
def roberta_large(tmp_path):
    config = transformers.RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("r", "trained", "macs"),
    [(8, "2,162,688", "77.86"), (16, "4,325,376", "78.42"), (24, "6,488,064", "78.97")],
)
def test_loras_row_of_table_8(roberta_large, r, trained, macs, capsys):
    """LoRA-SB's table 8; it prints 78.98 G for r = 24, where 78.974 G rounds to 78.97."""
    flags = ["--task", "classification", "--init", "lora", "--seq", "256", "--r", str(r)]
    assert main(["describe", roberta_large, *flags, "--target-modules", *GLUE]) == 0
    printed = capsys.readouterr().out
    assert f"{trained} in adapters" in " ".join(printed.split())
    assert f"{macs} G MACs" in printed


def test_a_core_adds_its_square(roberta_large, capsys):
    flags = ["--task", "classification", "--seq", "256", "--r", "24"]
    assert main(["describe", roberta_large, *flags, "--target-modules", *GLUE]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "55,296 in adapters" in printed  # 96 layers of 24²
    assert "coverage: " in printed
    assert "not adapted: 48 Linear (" in printed


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_macs_are_half_the_flops_of_the_products(architecture):
    """Counted by torch in a real forward pass of the plain model."""
    model = build(architecture)
    config = LoRASBConfig(4, init="orthogonal")
    planned = describe(model, config)
    tokens = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if op.__name__ in ("mm", "addmm"))
    adapters = sum(4 * (la.out_features + la.in_features) + 16 for la in planned.layers)
    assert 2 * (planned.macs(tokens) - adapters * tokens) == products
    assert describe(adapt(model, config, progress=False)) == planned


@pytest.mark.parametrize("seq", ["0", "-3"])
def test_a_sequence_without_tokens_is_refused(roberta_large, seq, capsys):
    assert main(["describe", roberta_large, "--seq", seq]) == 2
    assert f"--seq is {seq}; expected" in capsys.readouterr().err


def test_layers_of_one_kind_share_a_row_of_a_terminal(roberta_large, capsys):
    assert main(["describe", roberta_large, "--r", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trainable: ")
    assert lines[1].startswith("coverage: ")
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[start + 2 :]]
    assert [row[:3] for row in rows[:-2]] == [
        ["attention.self.query", "24", "1024x1024"],
        ["attention.self.key", "24", "1024x1024"],
        ["attention.self.value", "24", "1024x1024"],
        ["attention.output.dense", "24", "1024x1024"],
        ["intermediate.dense", "24", "4096x1024"],
        ["output.dense", "24", "1024x4096"],
        ["lm_head.dense", "1", "1024x1024"],
    ]
    assert rows[-1][:2] == ["145", "layers"]
    assert max(map(len, lines[start:])) <= 80


def test_kinds_that_end_alike_are_told_apart():
    kinds = str(describe(build("t5"), LoRASBConfig(4, init="orthogonal")))
    assert "encoder.block.*" in kinds
    assert "decoder.block.*" in kinds


def test_a_preset_needs_no_configuration(capsys):
    assert main(["describe", "mistral-7b", "--r", "96"]) == 0
    out = capsys.readouterr().out
    assert f"{32 * 7 * 96 * 96:,} in adapters" in out
    assert "7,241,465,856 parameters" in out
