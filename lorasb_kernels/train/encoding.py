"""From rows to token ids and labels."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.data import Example, Labelled

PLAIN_TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"  # for tokenizers without a chat template


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample, with one label per token or one label per sample."""

    input_ids: list[int]
    labels: list[int] | int | float
    positions: list[int] = field(default_factory=list)  # packed samples only: restart at 0
    segments: list[int] = field(default_factory=list)  # 0 and 1 for the texts of a pair


@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one model.

    Args:
        tokenizer: a tokenizer of transformers with a padding token.
        max_length: tokens a sample may have.
        system_prompt: for the chat template; None: the template's own.
    """

    tokenizer: object
    max_length: int
    system_prompt: str | None = None

    @property
    def pad_token_id(self) -> int:
        """The token that fills a batch."""
        return self.tokenizer.pad_token_id

    def prompt(self, instruction: str) -> list[int]:
        """Token ids that ask for the response: the chat template's, or a plain template's."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": instruction}]
            if self.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            start = f"{self.system_prompt}\n\n" if self.system_prompt else ""
            text = (self.tokenizer.bos_token or "") + start + PLAIN_TEMPLATE.format(instruction)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def response(self, response: str) -> list[int]:
        """Token ids of the response and the end of the turn."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def examples(self, examples: Iterable[Example]) -> list[Encoded]:
        """Prompt and response as one sequence, with labels on the response only.

        A sequence longer than `max_length` tokens is truncated at the end; one whose prompt leaves
        no room for a response is left out.
        """
        encoded = []
        for example in examples:
            prompt = self.prompt(example.instruction)
            response = self.response(example.response)[: max(0, self.max_length - len(prompt))]
            if response:
                encoded.append(Encoded(prompt + response, [IGNORED] * len(prompt) + response))
        return encoded

    def labelled(self, rows: Iterable[Labelled]) -> list[Encoded]:
        """Texts, or pairs of texts, cut to `max_length` tokens, each with its label."""
        encoded = []
        for row in rows:
            text = self.tokenizer(
                row.text, row.text_pair, truncation=True, max_length=self.max_length
            )
            segments = text.get("token_type_ids", [])
            encoded.append(Encoded(text["input_ids"], row.label, segments=segments))
        return encoded
