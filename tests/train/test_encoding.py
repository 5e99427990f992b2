"""Tokens and labels: loss on the response only."""

import pytest

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.encoding import Encoder, check_lengths
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Example, Labelled

CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}Response :"


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, max_length=32)


def test_labels_cover_the_response_and_the_end_only(encoder, tokenizer):
    (sample,) = encoder.examples([Example("two plus two", "four yes")])
    labelled = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    assert labelled == list(range(len(sample.input_ids) - 3, len(sample.input_ids)))
    answer = [sample.labels[i] for i in labelled]
    assert tokenizer.decode(answer) == "four yes </s>"
    assert answer == sample.input_ids[-3:]
    assert "two plus two" in tokenizer.decode(sample.input_ids[:-3])


def test_the_prompt_of_training_is_the_prompt_of_generation(encoder):
    (sample,) = encoder.examples([Example("two plus two", "four")])
    prompt = encoder.prompt(Example("two plus two", ""))
    assert sample.input_ids[: len(prompt)] == prompt


def test_long_samples_are_cut_and_prompts_without_room_left_out(tokenizer):
    prompt = len(Encoder(tokenizer, 99).prompt(Example("two plus two", "")))
    example = Example("two plus two", "four yes yes yes")
    (sample,) = Encoder(tokenizer, prompt + 2).examples([example])
    assert len(sample.input_ids) == prompt + 2
    assert sample.labels[-1] == sample.input_ids[-1]
    assert Encoder(tokenizer, prompt).examples([example]) == []


def test_what_is_cut_and_left_out_is_counted_and_too_much_is_an_error(tokenizer):
    prompt = len(Encoder(tokenizer, 99).prompt(Example("two plus two", "")))
    rows = [Example("two plus two", "four")] * 8
    rows += [Example("two plus two", "four yes yes"), Example("two plus two" + " is" * 3, "four")]
    samples = Encoder(tokenizer, prompt + 2).examples(rows)
    assert (len(samples), [sample.cut for sample in samples].index(True)) == (9, 8)
    assert samples[8].input_ids[-1] != tokenizer.eos_token_id
    message = check_lengths(rows, samples, prompt + 2, 0.2, "training")
    assert "cuts the end off 1 of 10 rows and leaves out 1" in message
    with pytest.raises(DataError, match=r"expected at most a share of 0\.1 \(max_cut_share\)"):
        check_lengths(rows, samples, prompt + 2, 0.1, "training")
    assert check_lengths(rows[:8], samples[:8], prompt + 2, 0.0, "training") is None
    texts = [Labelled("good film", 1), Labelled("bad " * 9, 0)]
    cut = Encoder(tokenizer, 4).labelled(texts)
    assert "1 of 2 rows" in check_lengths(texts, cut, 4, 0.5, "evaluation")


def test_the_chat_template_is_used_where_there_is_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    text = tokenizer.decode(
        Encoder(tokenizer, 32, system_prompt="very good").prompt(Example("one", ""))
    )
    assert text == "<unk> : very good <unk> : one Response :"


def test_texts_and_pairs_keep_their_label_and_length(tokenizer):
    samples = Encoder(tokenizer, 4).labelled([Labelled("good film", 1), Labelled("bad " * 9, 0)])
    assert [s.labels for s in samples] == [1, 0]
    assert [len(s.input_ids) for s in samples] == [2, 4]
