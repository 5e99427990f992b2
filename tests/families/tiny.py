"""A tiny random model of any architecture of transformers, from its default configuration.

Sizes are reduced by their names, in the configuration and in those it contains. `CHANGES` holds
what a family needs beyond that.
"""

from typing import Any

import torch
import transformers as hf

VOCABULARY = 64
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "n_embed"), 32),
    **dict.fromkeys(("decoder_hidden_size", "projection_dim", "embedding_size"), 32),
    **dict.fromkeys(("cross_attention_hidden_size",), 32),
    **dict.fromkeys(("word_embed_proj_dim", "hidden_dim", "encoder_hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "decoder_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers", "num_hidden_groups"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_num_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
}


KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ONE_OF_EACH = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {
        **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    },
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "DeepseekV2ForCausalLM": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "Ernie4_5_MoeForCausalLM": {"moe_k": 2},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "JambaForCausalLM": {
        **_ONE_OF_EACH,
        **{"expert_layer_period": 2, "expert_layer_offset": 0, "mamba_dt_rank": 4},
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LongT5ForConditionalGeneration": {"decoder_start_token_id": 0},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen2VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen2_5_VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "PaddleOCRVLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
}


def shrink(config: hf.PreTrainedConfig) -> None:
    """Reduces the sizes in `config` and in the configurations it contains, in place."""
    heads = [getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    for name, value in list(vars(config).items()):
        if isinstance(value, hf.PreTrainedConfig):
            shrink(value)
        elif name in SIZES and type(value) is int and value > 0:
            setattr(config, name, min(SIZES[name], value))
        elif name.endswith("token_id") and type(value) is int and value >= VOCABULARY:
            setattr(config, name, VOCABULARY - 1 - sum(map(ord, name)) % 5)
        elif isinstance(value, dict) and "mrope_section" in value:
            setattr(config, name, value | {"mrope_section": [2, 1, 1]})
    if heads[0] is not None and heads[0] == heads[1]:
        config.num_key_value_heads = config.num_attention_heads
    _keep_each_kind_of_layer(config)


def _keep_each_kind_of_layer(config: hf.PreTrainedConfig) -> None:
    """As many layers as there are kinds of them, where the configuration lists their kinds."""
    kinds = {name: vars(config).get(name) for name in KINDS_OF_LAYERS}
    kinds = {name: value for name, value in kinds.items() if isinstance(value, list) and value}
    if not kinds:
        return
    longest = max(len(dict.fromkeys(value)) for value in kinds.values())
    layers = max(2, longest)
    for name, value in kinds.items():
        different = list(dict.fromkeys(value))
        setattr(config, name, (different * layers)[:layers])
    config.num_hidden_layers = layers


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny random model of the class `name` of transformers, in eval mode.

    The global generator is unchanged.
    """
    kind = getattr(hf, name)
    config = kind.config_class()
    shrink(config)
    for path, value in CHANGES.get(name, {}).items():
        holder = config
        *parts, key = path.split(".")
        for part in parts:
            holder = getattr(holder, part)
        setattr(holder, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind._from_config(config).eval()
