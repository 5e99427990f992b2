"""Conversations: what is learned is what the assistant says, after what a generation would see."""

import pytest

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.data import read_examples
from lorasb_kernels.train.encoding import Encoder, check_lengths
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Conversation, Example
from lorasb_kernels.train.templates import TEMPLATES

TURNS = (
    "{% for m in messages %}{{ m.role }} : {{ START }}{{ m.content }}{{ END }} {{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
PLAIN = TURNS.replace("{{ START }}", "").replace("{{ END }}", "")
# Drops the reasoning, here the word "very", from all turns but the last.
REASONING = TURNS.replace("{{ END }}", "").replace(
    "{{ START }}", "{% if loop.last and m.role == 'assistant' %}very {% endif %}"
)
OTHERWISE = PLAIN.replace("{{ m.role }} :", "{{ m.role }} ?")
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} {{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def chat(*contents, given=0, tools=()):
    roles = ("user", "assistant") * len(contents)
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    return Conversation(tuple(messages), tools, given)


def learned(tokenizer, sample):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


@pytest.fixture(params=[PLAIN, MARKED, None], ids=["prefixes", "marks", "none"])
def encoder(request, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", request.param)
    return Encoder(tokenizer, max_length=64)


def test_all_turns_of_the_assistant_are_learned(encoder, tokenizer):
    (sample,) = encoder.examples([chat("two plus two", "four", "is it good", "very good")])
    assert learned(tokenizer, sample) == "four </s> very good </s>"
    assert all(
        label in (IGNORED, i) for i, label in zip(sample.input_ids, sample.labels, strict=True)
    )
    assert "is it" not in learned(tokenizer, sample)


def test_turns_of_the_prompt_are_not_learned(encoder, tokenizer):
    (sample,) = encoder.examples([chat("one", "two", "three", "four", given=3)])
    assert learned(tokenizer, sample) == "four </s>"
    assert "two" in tokenizer.decode(sample.input_ids)


def test_one_turn_is_an_instruction_with_its_response(encoder):
    example, conversation = Example("two plus two", "four yes"), chat("two plus two", "four yes")
    (one,), (other,) = encoder.examples([example]), encoder.examples([conversation])
    kept = len(one.input_ids)
    assert (other.input_ids[:kept], other.labels[:kept]) == (one.input_ids, one.labels)
    assert set(other.labels[kept:]) <= {IGNORED}
    assert encoder.question(example) == encoder.question(conversation)


def test_what_follows_the_last_answer_is_not_seen(encoder):
    turns = chat("one", "two", "three")
    assert encoder.examples([turns]) == encoder.examples([chat("one", "two")])
    assert (turns.response, turns.question) == ("two", turns.messages[:1])


def test_a_system_prompt_stands_before_conversations_that_have_none(encoder, tokenizer):
    given = Encoder(tokenizer, 64, system_prompt="very good")
    system = {"role": "system", "content": "very good"}
    opened = Conversation((system, *chat("one", "two").messages))
    assert given.examples([chat("one", "two")]) == encoder.examples([opened])
    assert given.examples([opened]) == encoder.examples([opened])


def test_turns_that_are_rendered_anew_become_samples_of_their_own(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", REASONING)
    rows = [chat("one", "two", "three", "four")]
    first, second = Encoder(tokenizer, 64).examples(rows)
    assert learned(tokenizer, first) == "very two </s>"
    assert learned(tokenizer, second) == "very four </s>"
    assert "very two" not in tokenizer.decode(second.input_ids), "as a generation sees it"
    assert (first.continued, second.continued) == (False, True)
    assert check_lengths(rows, [first, second], 64, 0.0, "training") is None


def test_templates_that_cannot_tell_the_assistants_part_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", OTHERWISE)
    with pytest.raises(DataError, match=r"row 2: the chat template.*\{% generation %\}"):
        Encoder(tokenizer, 64).examples([Example("one", "two"), chat("one", "two")])


def test_messages_that_the_template_refuses_are_named(tokenizer, monkeypatch):
    refusing = "{{ raise_exception('no system here') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(DataError, match=r"row 1: the chat template refuses.*no system here"):
        Encoder(tokenizer, 64).examples([chat("one", "two")])


def test_tools_reach_the_template_or_are_refused(tokenizer, monkeypatch):
    row = chat("one", "two", tools=({"name": "plus"},))
    with pytest.raises(DataError, match="tools are given"):
        Encoder(tokenizer, 64).examples([row])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools[0].name }} " + PLAIN)
    (sample,) = Encoder(tokenizer, 64).examples([row])
    assert tokenizer.decode(sample.input_ids).startswith("plus")


def test_named_templates_take_instructions(tokenizer):
    encoder = Encoder(tokenizer, 64, template=TEMPLATES["alpaca"])
    for row in (chat("one", "two"), Example("one", "two", verbatim=True)):
        with pytest.raises(DataError, match="a template is named"):
            encoder.examples([row])


def test_prompts_and_completions_stand_as_they_are(encoder, tokenizer):
    (sample,) = encoder.examples([Example("two plus two", "four", verbatim=True)])
    assert tokenizer.decode(sample.input_ids) == "two plus two four </s>"
    assert learned(tokenizer, sample) == "four </s>"


def test_plain_texts_are_split_and_nothing_is_lost(tokenizer):
    words = "one two three four five six seven"
    rows = [Example("", words, verbatim=True)] * 2
    samples = Encoder(tokenizer, 3).examples(rows)
    assert [tokenizer.decode(sample.labels) for sample in samples[:3]] == [
        "one two three",
        "four five six",
        "seven </s>",
    ]
    assert check_lengths(rows, samples, 3, 0.0, "training") is None


ROWS = [
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', 0),
    ('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', 0),
    (
        '{"prompt": [{"role": "user", "content": "a"}],'
        ' "completion": [{"role": "assistant", "content": "b"}]}',
        1,
    ),
]


@pytest.mark.parametrize(("row", "given"), ROWS)
def test_the_forms_of_chat_files(tmp_path, row, given):
    path = tmp_path / "chat.jsonl"
    path.write_text(row)
    assert read_examples(path) == [chat("a", "b", given=given)]


def test_prompt_and_completion_as_texts_and_plain_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": " b"}')
    assert read_examples(path) == [Example("a", " b", verbatim=True)]
    path.write_text('{"text": "a b"}')
    assert read_examples(path) == [Example("", "a b", verbatim=True)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": "hello"}', "messages is 'hello'; expected a list of objects"),
        ('{"messages": []}', r"roles are \[\]; expected 'assistant'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "roles are .*expected 'assistant'"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "messages 1 has role 1"),
        ('{"messages": [{"role": "assistant"}]}', "messages 1 has content None"),
        ('{"conversations": [{"from": "gpt", "value": 7}]}', "conversations 1 has content 7"),
        ('{"prompt": [], "completion": "b"}', "completion is 'b'; expected a list"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": "{"}',
            "tools is '{'; expected JSON",
        ),
    ],
)
def test_unusable_conversations_are_named(tmp_path, row, message):
    path = tmp_path / "chat.jsonl"
    path.write_text(row)
    with pytest.raises(DataError, match=rf"chat\.jsonl:1: {message}.*\(format "):
        read_examples(path)
