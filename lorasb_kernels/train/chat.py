"""A conversation with a model, answered as it was trained to answer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from lorasb_kernels import load_adapter
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import setting_errors
from lorasb_kernels.train.samples import Conversation, Example


class Talk:
    """Asks a model and keeps what was said.

    Args:
        model: a causal language model.
        encoder: renders the turns. A named template holds one instruction, so with one the model
            sees the last turn only.
        options: of `model.generate`, such as `max_new_tokens`.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, **options: Any):
        self.model, self.encoder, self.options = model, encoder, options
        self.messages: list[dict[str, str]] = []

    @torch.inference_mode()
    def ask(self, text: str) -> str:
        """The answer, which is also written to the standard output as it comes."""
        turns = [*self.messages, {"role": "user", "content": text}]
        if self.encoder.template is None:
            asked = Conversation((*turns, {"role": "assistant", "content": ""}))
        else:
            asked = Example(text, "")
        tokenizer = self.encoder.tokenizer
        prompt = torch.tensor([self.encoder.question(asked)], device=self.model.device)
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=self.encoder.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **self.options,
        )
        answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer


def load(model: str, adapter: str | None, system_prompt: str | None) -> tuple[nn.Module, Encoder]:
    """A model with an adapter of ours or of peft, for inference, and its encoder.

    Args:
        model: folder or hub id.
        adapter: folder or hub id of what `save_adapter` or peft saved; None: the model alone.
        system_prompt: stands before the conversation.

    Raises:
        ConfigError: what cannot be loaded.
    """
    with setting_errors(f"model is {model!r}: "):
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        with setting_errors(f"adapter is {adapter!r}: "):
            if (Path(adapter) / "adapter_config.json").exists():
                import peft

                loaded = peft.PeftModel.from_pretrained(loaded, adapter)
            else:
                load_adapter(loaded, adapter)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    length = loaded.config.get_text_config().max_position_embeddings
    return loaded.eval().to(device), Encoder(tokenizer, length, system_prompt)
