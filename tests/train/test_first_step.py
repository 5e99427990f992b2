"""LoRA-SB against LoRA-XS on the demo's data and encoder, after one optimizer step each."""

import pytest
import torch
import transformers as hf

from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.train.demo import assets, headlines

RATE = 1e-4


@pytest.fixture(scope="module")
def batch():
    rows = headlines.load().train[:32]
    tokenizer = hf.AutoTokenizer.from_pretrained(assets.minilm())
    inputs = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([row.label for row in rows])}


def loss_after_one_step(init: str, batch: dict[str, torch.Tensor]) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the head is new and random: the same for both
        model = hf.AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=2)
    model.eval()
    adapt(model, LoRASBConfig(8, init=init), [batch], learning_rate=RATE, progress=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        return model(**batch).loss.item()


def test_lora_sb_is_ahead_of_lora_xs_after_the_first_step(batch):
    lora_sb, lora_xs = (loss_after_one_step(init, batch) for init in ("lora-sb", "lora-xs"))
    assert lora_sb < lora_xs - 1e-3, (lora_sb, lora_xs)
