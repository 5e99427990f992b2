"""Models that mix the samples of a packed or padded batch are refused before training."""

import pytest
import torch
import transformers

from lorasb_kernels.train.encoding import Encoded, Encoder
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.run import finetune
from lorasb_kernels.train.separation import check_separation
from tests.train.conftest import reviews, sums, tiny_config

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}


def build(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **TOKENS, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
KEEP_APART = {
    "Llama": LLAMA,
    "Qwen3": LLAMA | {"head_dim": 8},
    "Gemma2": LLAMA | {"head_dim": 8, "sliding_window": 64},
}
MIX = {
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "Falcon": {"alibi": True, "new_decoder_architecture": False},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "Lfm2": LLAMA | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Qwen3Next": LLAMA
    | {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def samples(count: int = 6) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 64, (8 + 3 * i,), generator=generator).tolist() for i in range(count)]
    return [Encoded(row, list(row)) for row in ids]


@pytest.mark.parametrize("name", KEEP_APART)
def test_models_that_keep_samples_apart_pass(name):
    model = build(name, **KEEP_APART[name])
    check_separation(model, samples(), 0, packed=True)
    check_separation(model, samples(), 0, packed=False)
    assert model.training


@pytest.mark.parametrize("name", MIX)
def test_models_that_mix_packed_samples_are_refused(name):
    model = build(name, **MIX[name])
    with pytest.raises(ConfigError, match="does not keep packed samples apart"):
        check_separation(model, samples(), 0, packed=True)
    check_separation(model, samples(), 0, packed=False)


def test_a_model_that_does_not_ignore_padding_is_refused():
    model = build(
        "RecurrentGemma",
        intermediate_size=48,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=16,
        w_init_variance_scale=1.0,
    )
    with torch.no_grad():  # as in a trained model; a new one's padding is all zeros
        model.get_input_embeddings().weight[0].normal_()
    with pytest.raises(ConfigError, match="does not ignore padding"):
        check_separation(model, samples(), 0, packed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_mixing(dtype):
    model = build("Llama", **LLAMA).to(dtype)
    check_separation(model, samples(), 0, packed=True)
    check_separation(model, samples(), 0, packed=False)


def test_a_single_sample_has_nothing_to_be_kept_apart_from():
    check_separation(build("OPT", **MIX["OPT"]), samples(1), 0, packed=True)


def test_classifiers_pass(bert, tokenizer):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    check_separation(model, Encoder(tokenizer, 16).labelled(reviews(8)), 0, packed=False)


def test_a_run_is_refused_before_anything_is_trained(tmp_path, tokenizer):
    build("OPT", **MIX["OPT"]).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    config = tiny_config(tmp_path / "opt", tmp_path / "run", batching="packed")
    with pytest.raises(ConfigError, match="OPTForCausalLM does not keep packed samples apart"):
        finetune(config, sums(24))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "adapter").exists()
