"""Heads are what starts at random for a task, and output embeddings; nothing else."""

import pytest
import torch

from lorasb_kernels.targets import find_targets
from tests.families.tiny import build


def adapted(name):
    with torch.device("meta"):
        model = build(name)
    targets = find_targets(model, "all-linear")
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return set(targets), linear


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("BertForSequenceClassification", {"classifier"}),
        ("RobertaForSequenceClassification", {"classifier.dense", "classifier.out_proj"}),
        ("BertForQuestionAnswering", {"qa_outputs"}),
        ("ViTForImageClassification", {"classifier"}),
        ("CLIPForImageClassification", {"classifier"}),
        ("SiglipForImageClassification", {"classifier", "vision_model.head.attention.out_proj"}),
        ("Wav2Vec2ForCTC", {"lm_head"}),
        ("LlamaForCausalLM", {"lm_head"}),
        ("LlamaForSequenceClassification", {"score"}),
        ("WhisperForConditionalGeneration", {"proj_out"}),
        ("BertForMaskedLM", {"cls.predictions.decoder"}),
        ("ViTMAEForPreTraining", set()),
    ],
)
def test_what_all_linear_leaves_out(name, heads):
    targets, linear = adapted(name)
    assert linear - targets == heads


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ViTMAEForPreTraining", "decoder.decoder_layers.0"),
        ("BertForMaskedLM", "cls.predictions.transform.dense"),
        ("PI0ForConditionalGeneration", "action"),
    ],
)
def test_what_trains_with_the_model_is_adapted(name, part):
    targets, _ = adapted(name)
    assert any(part in target for target in targets)
