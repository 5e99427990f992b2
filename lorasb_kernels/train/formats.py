"""The forms of rows: those of the papers as they are distributed, those of chats, and our own."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Conversation, Example
from lorasb_kernels.utils.fields import shown

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Row:
    """One row; fields that cannot be used raise DataError with its place and its format."""

    def __init__(self, source: str | Path, number: int, fields: dict[str, Any], expected: str):
        self.place, self.fields, self.expected = f"{source}:{number}", fields, expected

    def error(self, message: str) -> DataError:
        """What is wrong, with the file, the row and the fields of the format."""
        return DataError(f"{self.place}: {message} ({self.expected})")

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value or not _is_unicode(value):
            raise self.error(f"{name} is {shown(value)}; expected a text")
        return value

    def optional(self, name: str) -> str:
        """A text, empty where the row has none."""
        return self.text(name) if self.fields.get(name) else ""

    def choices(self) -> tuple[str, ...]:
        """A list (JSON) or a text separated by `|` (CSV); empty where the row has none."""
        choices = self.fields.get("choices") or ()
        if isinstance(choices, str):
            choices = choices.split("|")
        if not isinstance(choices, (list, tuple)) or not all(
            isinstance(choice, (str, int, float)) and _is_unicode(str(choice)) for choice in choices
        ):
            raise self.error(f"choices is {shown(choices)}; expected a list of texts")
        return tuple(map(str, choices))

    def messages(self, name: str) -> tuple[dict[str, Any], ...]:
        """A list of messages of a chat."""
        value = self.fields.get(name)
        for place, message in enumerate(self._objects(name, value), 1):
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str):
                raise self.error(f"{name} {place} has role {shown(role)}; expected a text")
            texts = isinstance(content, str) and _is_unicode(content)
            if not (texts or isinstance(content, list) or message.get("tool_calls")):
                raise self.error(f"{name} {place} has content {shown(content)}; expected a text")
        return tuple(value)

    def tools(self) -> tuple[dict[str, Any], ...]:
        """A list of functions, or its JSON; empty where the row has none."""
        value = self.fields.get("tools") or []
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.error(f"tools is {shown(value)}; expected JSON") from error
        return tuple(self._objects("tools", value))

    def _objects(self, name: str, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"{name} is {shown(value)}; expected a list of objects")
        return value

    def number(self, name: str) -> float:
        """A number, or a text that is one in ASCII digits; NaN for anything else."""
        value = self.fields.get(name)
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.nan
        return math.nan


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can contain but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Format:
    """A form of rows.

    Args:
        name: for `data_format`.
        fields: what every row has.
        convert: an `Example`, a `Conversation` or None (to leave the row out); or (text, second
            text) for a row with a label.
        by_name_only: never recognised, only asked for.
        metric: how its papers judge by such rows; None: nothing is said.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Row], Any]
    by_name_only: bool = False
    metric: str | None = None

    def __str__(self):
        return f"format {self.name}: {', '.join(self.fields)}"


def _own(row: Row) -> Example:
    choices, response = row.choices(), row.text("response")
    if choices and response not in choices:
        raise row.error(f"response {shown(response)} is none of {shown(choices)}")
    return Example(row.text("instruction"), response, choices, row.optional("input"))


def _commonsense(row: Row) -> Example:
    instruction, output, answer = (row.text(n) for n in ("instruction", "output", "answer"))
    _, found, listed = instruction.rpartition("Answer format:")
    choices = tuple(choice.strip() for choice in listed.split("/")) if found else ()
    if answer not in choices:
        raise row.error(
            f"answer {shown(answer)} is none of {shown(choices)}, after 'Answer format:'"
        )
    if answer not in output:
        raise row.error(f"output {shown(output)} does not name the answer {shown(answer)}")
    return Example(instruction, output, choices, row.optional("input"), answer)


def _alpaca(row: Row) -> Example:
    return Example(row.text("instruction"), row.text("output"), input=row.optional("input"))


def _metamath_gsm(row: Row) -> Example | None:
    """LoRA-One's selection: the rows made from GSM8K, without their line 'The answer is:'."""
    if "GSM" not in row.text("type"):
        return None
    return Example(row.text("query"), row.text("response").split("\nThe answer is:")[0])


def _messages(row: Row) -> Conversation:
    return _conversation(row, row.messages("messages"))


def _conversation(row: Row, messages: tuple[dict[str, Any], ...], given: int = 0) -> Conversation:
    conversation = Conversation(messages, row.tools(), given)
    if not conversation.learned:
        roles = [message["role"] for message in messages[given:]]
        raise row.error(f"roles are {shown(roles)}; expected 'assistant' among them")
    return conversation


SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; others are chat templates'


def _sharegpt(row: Row) -> Conversation:
    turns = row.fields.get("conversations")
    if isinstance(turns, list) and all(isinstance(t, dict) and "from" in t for t in turns):
        named = [(SPEAKERS.get(str(t["from"]), t["from"]), t.get("value")) for t in turns]
        turns = [{"role": role, "content": content} for role, content in named]
    row.fields["conversations"] = turns
    return _conversation(row, row.messages("conversations"))


def _completion(row: Row) -> Example | Conversation:
    """Texts as they stand, or messages of which only the completion's are learned."""
    if isinstance(row.fields.get("prompt"), str):
        return Example(row.text("prompt"), row.text("completion"), verbatim=True)
    prompt = row.messages("prompt")
    return _conversation(row, prompt + row.messages("completion"), len(prompt))


def _plain_text(row: Row) -> Example:
    return Example("", row.text("text"), verbatim=True)


def _pair(instruction: str, response: str) -> Callable[[Row], Example]:
    return lambda row: Example(row.text(instruction), row.text(response))


def _texts(first: str, second: str | None = None) -> Callable[[Row], tuple[str, str | None]]:
    return lambda row: (row.text(first), row.text(second) if second else None)


EXAMPLE_FORMATS = (
    Format("instruction", ("instruction", "response"), _own),
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("prompt-completion", ("prompt", "completion"), _completion),
    Format("metamath", ("query", "response"), _pair("query", "response")),
    Format("metamath-gsm", ("query", "response", "type"), _metamath_gsm, by_name_only=True),
    Format("gsm8k", ("question", "answer"), _pair("question", "answer"), metric="numeric"),
    Format("math", ("problem", "solution"), _pair("problem", "solution"), metric="math"),
    Format("commonsense", ("instruction", "output", "answer"), _commonsense, metric="answer"),
    Format("alpaca", ("instruction", "output"), _alpaca, metric="math"),
    Format("plain-text", ("text",), _plain_text),
)
LABELLED_FORMATS = (
    Format(
        "text",
        ("text", "label"),
        lambda row: (row.text("text"), row.optional("text_pair") or None),
    ),
    Format("glue-mnli", ("premise", "hypothesis", "label"), _texts("premise", "hypothesis")),
    Format("glue-qnli", ("question", "sentence", "label"), _texts("question", "sentence")),
    Format("glue-qqp", ("question1", "question2", "label"), _texts("question1", "question2")),
    Format("glue-pair", ("sentence1", "sentence2", "label"), _texts("sentence1", "sentence2")),
    Format("glue-sentence", ("sentence", "label"), _texts("sentence")),
)
FORMATS = tuple(format.name for format in (*EXAMPLE_FORMATS, *LABELLED_FORMATS))
