"""What a row means: an instruction with its response, a conversation, a labelled text."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """An instruction and its response.

    Args:
        instruction: what is asked.
        response: what the model learns to write.
        choices: the answers there are to choose from, where there are such.
        input: what the instruction is about, where a row gives it apart.
        answer: the choice that the response names; empty: the response itself.
        verbatim: the instruction is the prompt as it stands, without a template; an empty one
            makes the response a plain text, every token of which is learned.
    """

    instruction: str
    response: str
    choices: tuple[str, ...] = ()
    input: str = ""
    answer: str = ""
    verbatim: bool = False

    @property
    def is_text(self) -> bool:
        """Whether this is a plain text."""
        return self.verbatim and not self.instruction

    @property
    def label(self) -> str:
        """The right one of `choices`."""
        return self.answer or self.response

    def candidates(self) -> list[str]:
        """The response as it would be for each of the choices."""
        before, _, after = self.response.rpartition(self.label)
        return [before + choice + after for choice in self.choices]


@dataclass(frozen=True)
class Conversation:
    """Messages of a chat, of which the assistant's are learned.

    Args:
        messages: mappings as chat templates take them: `role`, `content`, `tool_calls`.
        tools: descriptions of functions, as chat templates take them.
        given: how many messages at the start belong to the prompt and are not learned.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    given: int = 0

    @property
    def choices(self) -> tuple[str, ...]:
        """None; see `Example.choices`."""
        return ()

    @property
    def label(self) -> str:
        """The response, as of an example without choices."""
        return self.response

    @property
    def learned(self) -> list[int]:
        """Places of the messages that are learned; never empty."""
        places = range(self.given, len(self.messages))
        return [i for i in places if self.messages[i]["role"] == "assistant"]

    @property
    def question(self) -> tuple[dict[str, Any], ...]:
        """The messages before the last one that is learned."""
        return self.messages[: self.learned[-1]]

    @property
    def response(self) -> str:
        """What the assistant says last; empty where it only calls tools."""
        return self.messages[self.learned[-1]].get("content") or ""


@dataclass(frozen=True)
class Labelled:
    """A text (or a pair of texts) and its label: a class index, or a score to regress on."""

    text: str
    label: int | float
    text_pair: str | None = None
