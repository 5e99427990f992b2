"""What a row means: an instruction with its response, a conversation, a labelled text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """An instruction and its response.

    Args:
        instruction: what is asked.
        response: what the model learns to write.
        choices: the answers there are to choose from, where there are such.
        input: what the instruction is about, where a row gives it apart.
        answer: the choice that the response names; empty: the response itself.
    """

    instruction: str
    response: str
    choices: tuple[str, ...] = ()
    input: str = ""
    answer: str = ""

    @property
    def label(self) -> str:
        """The right one of `choices`."""
        return self.answer or self.response

    def candidates(self) -> list[str]:
        """The response as it would be for each of the choices."""
        before, _, after = self.response.rpartition(self.label)
        return [before + choice + after for choice in self.choices]


@dataclass(frozen=True)
class Labelled:
    """A text (or a pair of texts) and its label: a class index, or a score to regress on."""

    text: str
    label: int | float
    text_pair: str | None = None
