"""Block-wise estimation on more architectures: blocks are found, no fallback, the same signs."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lorasb_kernels.init import EstimationOptions, estimate_updates
from tests.init.models import VOCABULARY, padded, samples
from tests.models import build

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OTHERS = {
    "Gemma3ForCausalLM": SIZES | {"sliding_window": 4},
    "BertForMaskedLM": SIZES,
    "AlbertForMaskedLM": SIZES | {"embedding_size": 16, "num_hidden_layers": 3},
    "BartForConditionalGeneration": BART,
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox"])
def test_layerwise_equals_resident(architecture):
    assert_layerwise_equals_resident(build(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_layerwise_equals_resident_elsewhere(kind):
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**OTHERS[kind]))
    assert_layerwise_equals_resident(model)


def assert_layerwise_equals_resident(model):
    model.train()
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    rows = samples(5)
    batches = [padded(rows[:2]), padded(rows[2:])]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="strategy")
        found = {
            strategy: dict(
                estimate_updates(model, batches, names, EstimationOptions(strategy=strategy))
            )
            for strategy in ("resident", "layerwise")
        }
    assert set(found["layerwise"]) == set(names)
    assert found["layerwise"] == found["resident"]
