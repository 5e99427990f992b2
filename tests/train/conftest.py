"""Tiny random models and a tiny tokenizer, saved once a session: nothing is downloaded."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorasb_kernels.train.config import TrainConfig
from lorasb_kernels.train.samples import Example, Labelled

WORDS = "zero one two three four five six seven eight nine plus is yes no good bad film very"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer that also knows digits and punctuation."""
    words = [*SPECIAL, *WORDS.split(), *"0123456789", *"#:?.,", "Instruction", "Response"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    """Folder of a two-layer Llama."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory, tokenizer):
    """Folder of a two-layer BERT."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sums(count: int) -> list[Example]:
    """`three plus four` is answered by `seven`; some answers are longer."""
    digits = WORDS.split()[:10]
    return [
        Example(
            f"{digits[i % 5]} plus {digits[i // 5 % 5]}" + " is" * (i % 3),
            f"{digits[i % 5 + i // 5 % 5]}" + " yes" * (i % 2),
        )
        for i in range(count)
    ]


def reviews(count: int) -> list[Labelled]:
    """Good films are labelled 1, bad ones 0."""
    return [
        Labelled(f"{'very ' * (i // 2 % 4)}{('bad', 'good')[i % 2]} film", i % 2)
        for i in range(count)
    ]


@pytest.fixture
def sums_file(tmp_path):
    """JSONL of 48 sums."""
    path = tmp_path / "sums.jsonl"
    rows = [{"instruction": e.instruction, "response": e.response} for e in sums(48)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tiny_config(model, output_dir, **changes) -> TrainConfig:
    """Twelve steps of eight on the CPU."""
    settings = {
        "data": "rows",
        "r": 4,
        "learning_rate": 2e-2,
        "batch_size": 8,
        "max_steps": 12,
        "max_length": 32,
        "init_minimum": 8,
        "save_steps": 100,
        "warmup_ratio": 0.0,
    }
    return TrainConfig(model=str(model), output_dir=str(output_dir), **(settings | changes))
