"""Architectures of transformers: adapted, trained, merged, saved, loaded; nothing in silence."""

import re
from pathlib import Path

import pytest

from lorasb_kernels.targets.coverage import NOT_SELECTED, THREE_DIMENSIONS, TWO_DIMENSIONS
from tests.families.checks import check_family
from tests.families.names import ALWAYS, FAMILIES
from tests.families.tiny import build

READ = "its weight is read past the layer"
READ_BY_MODEL = "the model reads its weight past the layer"
SMALL = "it has fewer than r = 4 inputs or outputs"


def experts(family, router):
    """What is not adapted of a mixture of experts."""
    return {
        (f"{family}Experts.gate_up_proj", THREE_DIMENSIONS),
        (f"{family}Experts.down_proj", THREE_DIMENSIONS),
        (f"{family}{router}.weight", TWO_DIMENSIONS),
    }


# Kind and reason of everything that is not adapted.
LEFT_OUT = {
    "Gemma3ForConditionalGeneration": {
        ("MultiheadAttention.in_proj_weight", TWO_DIMENSIONS),
        ("NonDynamicallyQuantizableLinear", READ),
        ("Gemma3MultiModalProjector.mm_input_projection_weight", TWO_DIMENSIONS),
    },
    "PaliGemmaForConditionalGeneration": set(),
    "Qwen3MoeForCausalLM": experts("Qwen3Moe", "TopKRouter"),
    "OlmoeForCausalLM": experts("Olmoe", "TopKRouter"),
    "GptOssForCausalLM": experts("GptOss", "TopKRouter"),
    "DeepseekV3ForCausalLM": experts("DeepseekV3", "TopkRouter"),
    "MixtralForCausalLM": experts("Mixtral", "TopKRouter"),
    "Qwen3NextForCausalLM": experts("Qwen3Next", "TopKRouter") | {("Linear", SMALL)},
    "GPT2LMHeadModel": set(),
    "FalconForCausalLM": set(),
    "WavLMForSequenceClassification": {("Linear", READ_BY_MODEL)},
    "WhisperForConditionalGeneration": set(),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_the_usual(name, tmp_path):
    coverage = check_family(build(name), tmp_path)
    left_out = {(group.kind.split(" ")[0], group.reason) for group in coverage.skipped}
    assert left_out == LEFT_OUT[name]
    assert coverage.adapted + sum(group.weights for group in coverage.skipped) == coverage.total


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALWAYS])
def test_the_others(name, tmp_path):
    coverage = check_family(build(name), tmp_path)
    assert 0 < coverage.share <= 1
    assert NOT_SELECTED not in {group.reason for group in coverage.skipped}


def test_the_page_lists_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    assert re.findall(r"^\| (\w+) \| [\d.]+%", page, re.MULTILINE) == sorted(FAMILIES)
