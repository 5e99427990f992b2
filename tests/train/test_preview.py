"""The preview marks what is learned."""

import pytest

from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.preview import MAX_TOKENS, preview
from lorasb_kernels.train.samples import Conversation, Example, Labelled

MESSAGES = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})


@pytest.mark.parametrize(
    ("row", "kind", "learned"),
    [
        (Example("one", "two"), "an instruction with its response", "two </s>"),
        (Example("one", "two", verbatim=True), "a prompt with its completion", "two </s>"),
        (Example("", "one two", verbatim=True), "a plain text", "one two </s>"),
        (Conversation(MESSAGES), "a conversation of 2 messages", "two </s>"),
    ],
)
def test_learned_tokens_are_green(tokenizer, row, kind, learned):
    (sample,) = Encoder(tokenizer, 64).examples([row])
    text = preview(tokenizer, sample, row)
    assert kind in text.plain
    green = [span for span in text.spans if "green" in str(span.style)]
    assert [text.plain[span.start : span.end] for span in green] == [learned]


def test_labels_are_shown_and_long_samples_cut(tokenizer):
    row = Labelled("good film", 1)
    (sample,) = Encoder(tokenizer, 64).labelled([row])
    assert preview(tokenizer, sample, row).plain.endswith("label 1")
    long = Example("", "one " * 2 * MAX_TOKENS, verbatim=True)
    (sample,) = Encoder(tokenizer, 4 * MAX_TOKENS).examples([long])
    text = preview(tokenizer, sample, long).plain
    assert text.count("one") == MAX_TOKENS
    assert text.endswith(f"({len(sample.input_ids)} tokens)")
