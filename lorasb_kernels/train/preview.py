"""The first sample as the model sees it: a wrong form or template shows before training."""

import itertools

from rich.text import Text

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.encoding import Encoded
from lorasb_kernels.train.samples import Conversation, Example, Labelled

MAX_TOKENS = 400  # shown of a sample


def preview(tokenizer, sample: Encoded, row: Example | Conversation | Labelled) -> Text:
    """The tokens of a sample, those that are learned in green and underlined.

    Args:
        tokenizer: of the model.
        sample: the first training sample.
        row: what it was made of.
    """
    labels = sample.labels if isinstance(sample.labels, list) else [IGNORED] * MAX_TOKENS
    text = Text(f"the first of the training rows, {_kind(row)}:\n")
    tokens = list(zip(sample.input_ids, labels, strict=False))[:MAX_TOKENS]
    for learned, part in itertools.groupby(tokens, lambda pair: pair[1] != IGNORED):
        style = "green underline" if learned else "dim"
        text.append(tokenizer.decode([token for token, _ in part]), style)
    if len(sample.input_ids) > MAX_TOKENS:
        text.append(f" … ({len(sample.input_ids)} tokens)")
    if not isinstance(sample.labels, list):
        text.append(f"\nlabel {sample.labels}", "green")
    return text


def _kind(row: Example | Conversation | Labelled) -> str:
    if isinstance(row, Labelled):
        return "a text with a label" if row.text_pair is None else "a pair of texts with a label"
    if isinstance(row, Conversation):
        return (
            f"a conversation of {len(row.messages)} messages (what the assistant says is learned)"
        )
    if row.is_text:
        return "a plain text (all of it is learned)"
    kind = "a prompt with its completion" if row.verbatim else "an instruction with its response"
    return f"{kind} (which is learned)"


__all__ = ["preview"]
