"""Tokens and labels: loss on the response only."""

import pytest

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.data import Example, Labelled
from lorasb_kernels.train.encoding import Encoder

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
    prompt = encoder.prompt("two plus two")
    assert sample.input_ids[: len(prompt)] == prompt


def test_long_samples_are_cut_and_prompts_without_room_left_out(tokenizer):
    prompt = len(Encoder(tokenizer, 99).prompt("two plus two"))
    example = Example("two plus two", "four yes yes yes")
    (sample,) = Encoder(tokenizer, prompt + 2).examples([example])
    assert len(sample.input_ids) == prompt + 2
    assert sample.labels[-1] == sample.input_ids[-1]
    assert Encoder(tokenizer, prompt).examples([example]) == []


def test_the_chat_template_is_used_where_there_is_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    text = tokenizer.decode(Encoder(tokenizer, 32, system_prompt="very good").prompt("one"))
    assert text == "<unk> : very good <unk> : one Response :"


def test_texts_and_pairs_keep_their_label_and_length(tokenizer):
    samples = Encoder(tokenizer, 4).labelled([Labelled("good film", 1), Labelled("bad " * 9, 0)])
    assert [s.labels for s in samples] == [1, 0]
    assert [len(s.input_ids) for s in samples] == [2, 4]
