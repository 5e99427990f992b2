"""From samples to token ids and labels, and the count of what does not fit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.conversation import Chat, Tokens
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Conversation, Example, Labelled
from lorasb_kernels.train.templates import PLAIN, Prompt, Template, instruction_text


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample, with one label per token or one label per sample."""

    input_ids: list[int]
    labels: list[int] | int | float
    positions: list[int] = field(default_factory=list)  # packed samples only: restart at 0
    segments: list[int] = field(default_factory=list)  # 0 and 1 for the texts of a pair
    cut: bool = False  # whether it lost its end to `max_length`
    continued: bool = False  # whether it goes on with the row of the sample before


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

    def prompt(self, example: Example | Conversation) -> list[int]:
        """Token ids that ask for the response in training."""
        if self.template is None:
            return self._asked(example, "")
        return self._tokens(self._of_template(example, self.template.training))

    def question(self, example: Example | Conversation) -> list[int]:
        """Token ids that ask for the response in an evaluation."""
        prefix = self.response_prefix
        if self.template is None:
            return self._asked(example, prefix or "")
        prefix = self.template.response_prefix if prefix is None else prefix
        return self._tokens(self._of_template(example, self.template.judging) + prefix)

    def sequence(self, example: Example, response: str) -> list[int]:
        """Token ids of prompt, response and end of the turn.

        A named template is tokenized in one piece with its response, as the public codes do.
        """
        if self.template is None:
            ids = self.prompt(example) + self._tokens(response, special=False)
        else:
            start = self._of_template(example, self.template.training)
            ids = self._tokens(start + self.template.response_start + response)
        return [*ids, self.tokenizer.eos_token_id]

    def examples(self, examples: Iterable[Example | Conversation]) -> list[Encoded]:
        """Samples with labels on the response, or on what the assistant says.

        A sequence longer than `max_length` tokens loses its end, and so its end of the turn; one
        whose prompt leaves no room for a response is left out. `check_lengths` counts both. A
        plain text is split instead.

        Raises:
            DataError: a conversation that cannot be rendered; examples are counted from 1.
        """
        encoded = []
        for number, example in enumerate(examples, 1):
            try:
                samples = self._samples(example)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
            found = [part for ids, labels in samples for part in self._fitted(ids, labels, example)]
            encoded += [replace(part, continued=i > 0) for i, part in enumerate(found)]
        return encoded

    def _samples(self, example: Example | Conversation) -> list[Tokens]:
        if isinstance(example, Conversation) and self.template is None:
            return self._chat.samples(example)
        ids, prompt = self.sequence(example, example.response), len(self.prompt(example))
        return [(ids, [IGNORED] * prompt + ids[prompt:])]

    def _fitted(self, ids: list[int], labels: list[int], example) -> Iterator[Encoded]:
        """The parts of `max_length` tokens of a plain text, else the first, if they are learned."""
        splits = isinstance(example, Example) and example.is_text
        for start in range(0, len(ids) if splits else 1, self.max_length):
            part = slice(start, start + self.max_length)
            if any(label != IGNORED for label in labels[part]):
                yield Encoded(ids[part], labels[part], cut=not splits and part.stop < len(ids))

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

    def _asked(self, example: Example | Conversation, prefix: str) -> list[int]:
        """A prompt as it stands, or by the chat template."""
        if isinstance(example, Example):
            if example.verbatim:
                return self._tokens(example.instruction + prefix)
            user = {"role": "user", "content": instruction_text(example)}
            example = Conversation((user, {"role": "assistant", "content": ""}))
        return self._tokens(self._chat.question(example) + prefix, special=False)

    def _of_template(self, example: Example | Conversation, prompt: Prompt) -> str:
        if isinstance(example, Conversation) or example.verbatim:
            raise DataError(
                "a template is named, which fills in an instruction; expected rows with one"
            )
        return prompt.fill(example)

    @property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer, self.system_prompt)

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
    dropped = len(rows) - sum(not sample.continued for sample in samples)
    cut = sum(sample.cut for sample in samples)
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
