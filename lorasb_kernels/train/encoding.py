"""From samples to token ids and labels, and the count of what does not fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Example, Labelled
from lorasb_kernels.train.templates import PLAIN, Template, instruction_text


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample, with one label per token or one label per sample."""

    input_ids: list[int]
    labels: list[int] | int | float
    positions: list[int] = field(default_factory=list)  # packed samples only: restart at 0
    segments: list[int] = field(default_factory=list)  # 0 and 1 for the texts of a pair
    cut: bool = False  # whether it lost its end to `max_length`


@dataclass(frozen=True)
class Encoder:
    """Encodes samples for one model.

    Args:
        tokenizer: a tokenizer of transformers with a padding token.
        max_length: tokens a sample may have.
        system_prompt: for the chat template; None: the template's own.
        template: how the model is asked; None: by the tokenizer's chat template, or plainly
            where it has none.
        response_prefix: the first words of an answer, given to the model in an evaluation;
            None: the template's.
        stop: texts at which a generated answer ends; None: the template's.
    """

    tokenizer: object
    max_length: int
    system_prompt: str | None = None
    template: Template | None = None
    response_prefix: str | None = None
    stop: tuple[str, ...] | None = None

    @property
    def pad_token_id(self) -> int:
        """The token that fills a batch."""
        return self.tokenizer.pad_token_id

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a generated answer ends."""
        if self.stop is not None:
            return self.stop
        if self.template is not None:
            return self.template.stop
        return () if self.tokenizer.chat_template else PLAIN.stop

    def prompt(self, example: Example) -> list[int]:
        """Token ids that ask for the response in training."""
        if self.template is None:
            return self._tokens(self._own_prompt(example), special=False)
        return self._tokens(self.template.training.fill(example))

    def question(self, example: Example) -> list[int]:
        """Token ids that ask for the response in an evaluation."""
        prefix = self.response_prefix
        if self.template is None:
            return self._tokens(self._own_prompt(example) + (prefix or ""), special=False)
        prefix = self.template.response_prefix if prefix is None else prefix
        return self._tokens(self.template.judging.fill(example) + prefix)

    def sequence(self, example: Example, response: str) -> list[int]:
        """Token ids of prompt, response and end of the turn.

        A named template is tokenized in one piece with its response, as the public codes do.
        """
        if self.template is None:
            ids = self.prompt(example) + self._tokens(response, special=False)
        else:
            start = self.template.training.fill(example) + self.template.response_start
            ids = self._tokens(start + response)
        return [*ids, self.tokenizer.eos_token_id]

    def examples(self, examples: Iterable[Example]) -> list[Encoded]:
        """Prompt and response as one sequence, with labels on the response only.

        A sequence longer than `max_length` tokens loses its end, and so its end of the turn; one
        whose prompt leaves no room for a response is left out. `check_lengths` counts both.
        """
        encoded = []
        for example in examples:
            prompt, ids = self.prompt(example), self.sequence(example, example.response)
            kept = ids[: self.max_length]
            if len(prompt) < len(kept):
                labels = [IGNORED] * len(prompt) + kept[len(prompt) :]
                encoded.append(Encoded(kept, labels, cut=len(kept) < len(ids)))
        return encoded

    def labelled(self, rows: Iterable[Labelled]) -> list[Encoded]:
        """Texts, or pairs of texts, cut to `max_length` tokens, each with its label."""
        encoded = []
        for row in rows:
            text = self.tokenizer(row.text, row.text_pair, verbose=False)
            cut = len(text["input_ids"]) > self.max_length
            if cut:
                text = self.tokenizer(
                    row.text, row.text_pair, truncation=True, max_length=self.max_length
                )
            segments = text.get("token_type_ids", [])
            encoded.append(Encoded(text["input_ids"], row.label, segments=segments, cut=cut))
        return encoded

    def _own_prompt(self, example: Example) -> str:
        """The chat template's prompt, or a plain one."""
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": instruction_text(example)}]
            if self.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        start = f"{self.system_prompt}\n\n" if self.system_prompt else ""
        return (self.tokenizer.bos_token or "") + start + PLAIN.training.fill(example)

    def _tokens(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens at the start that the tokenizer adds."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        # Some tokenizers end every text; the end of a turn is added where there is one.
        return ids[:-1] if special and ids[-1:] == [self.tokenizer.eos_token_id] else ids


def check_lengths(
    rows: Sequence, samples: Sequence[Encoded], max_length: int, limit: float, what: str
) -> str | None:
    """What `max_length` did to the rows, as a message; None where all fit.

    Args:
        rows: what was encoded.
        samples: what came of it, before packing.
        max_length: tokens a sample may have.
        limit: share of the rows that may be cut or left out.
        what: names the rows in the message.

    Raises:
        DataError: a larger share was.
    """
    dropped, cut = len(rows) - len(samples), sum(sample.cut for sample in samples)
    if not dropped + cut:
        return None
    message = (
        f"{what}: max_length = {max_length} tokens cuts the end off {cut} of {len(rows)} rows "
        f"and leaves out {dropped}, whose prompt fills it"
    )
    if dropped + cut > limit * len(rows):
        raise DataError(
            f"{message}; expected at most a share of {limit:g} (max_cut_share), or a larger "
            "max_length"
        )
    return message
