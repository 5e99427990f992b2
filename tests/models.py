"""Tiny random models of each supported architecture, built from their configurations."""

import torch
import transformers as hf

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


# The auto class, the configuration's class and its settings.
ARCHITECTURES = {
    "llama": (hf.AutoModelForCausalLM, hf.LlamaConfig, _TEXT | _GROUPED),
    "mistral": (
        hf.AutoModelForCausalLM,
        hf.MistralConfig,
        _TEXT | _GROUPED | {"sliding_window": 8},
    ),
    "gemma2": (
        hf.AutoModelForCausalLM,
        hf.Gemma2Config,
        _TEXT | _GROUPED | {"sliding_window": 4, "attn_implementation": "eager"},
    ),
    "qwen2": (hf.AutoModelForCausalLM, hf.Qwen2Config, _TEXT | {"num_key_value_heads": 2}),
    "qwen3": (hf.AutoModelForCausalLM, hf.Qwen3Config, _TEXT | _GROUPED),
    "phi": (hf.AutoModelForCausalLM, hf.PhiConfig, _TEXT),
    "phi3": (hf.AutoModelForCausalLM, hf.Phi3Config, _TEXT | {"num_key_value_heads": 2}),
    "gpt_neox": (hf.AutoModelForCausalLM, hf.GPTNeoXConfig, _TEXT),
    "gpt2": (hf.AutoModelForCausalLM, hf.GPT2Config, _TEXT),
    "roberta": (
        hf.AutoModelForSequenceClassification,
        hf.RobertaConfig,
        _TEXT | {"num_labels": 3},
    ),
    "bert": (hf.AutoModelForSequenceClassification, hf.BertConfig, _TEXT | {"num_labels": 3}),
    "t5": (
        hf.AutoModelForSeq2SeqLM,
        hf.T5Config,
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
    ),
}


def build(architecture: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny random model in eval mode; the global RNG is unchanged.

    Args:
        architecture: a key of `ARCHITECTURES`.
        seed: of its weights.
        changes: settings of its configuration that replace or extend those above.
    """
    kind, config, settings = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(config(**settings | changes)).eval()


def batches(architecture: str, count: int = 2, size: int = 3, seed: int = 1) -> list[dict]:
    """Padded batches with labels, as `model(**batch)` takes them."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(3, 64, (size, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        ids[0, 7:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if architecture in ("roberta", "bert"):
            batch["labels"] = torch.randint(0, 3, (size,), generator=generator)
        elif architecture == "t5":
            batch["labels"] = torch.randint(3, 64, (size, 6), generator=generator)
        else:
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        result.append(batch)
    return result


def few_steps(model, optimizer, data: list[dict], steps: int = 6) -> list[float]:
    """The loss over all of `data` before each of a few steps on it."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(model(**batch).loss for batch in data)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
