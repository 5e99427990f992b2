"""Metrics against their definitions, and the model's answers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.evaluation import check_rows, evaluate, generate
from lorasb_kernels.train.metrics import accuracy, matthews, pearson
from lorasb_kernels.train.samples import Example, Labelled
from tests.train.conftest import reviews, sums


def test_accuracy():
    assert accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 0.5


def test_matthews_is_the_binary_formula():
    rng = np.random.default_rng(0)
    p, y = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp, tn = ((p == 1) & (y == 1)).sum(), ((p == 0) & (y == 0)).sum()
    fp, fn = ((p == 1) & (y == 0)).sum(), ((p == 0) & (y == 1)).sum()
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(p.tolist(), y.tolist()) == pytest.approx(expected)
    assert matthews([0, 1, 2, 0], [0, 1, 2, 0]) == pytest.approx(1)
    assert matthews([1, 1, 1], [0, 1, 0]) == 0


def test_pearson_is_the_correlation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    assert pearson(x.tolist(), y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson([1.0, 1.0], [0.0, 1.0]) == 0


@pytest.fixture(scope="module")
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, 32)


def test_choice_takes_the_likelier_answer(model, encoder, tokenizer):
    """Against the log-likelihoods of the whole answers, one by one."""
    rows = [
        Example(row.instruction, answer, ("yes", "no"))
        for row, answer in zip(sums(10), ["yes", "no"] * 5, strict=True)
    ]
    right = 0
    model.eval()
    for row in rows:
        prompt = torch.tensor([encoder.prompt(row)])
        scores = model(prompt).logits[0, -1]
        ids = [tokenizer.convert_tokens_to_ids(choice) for choice in row.choices]
        right += row.choices[scores[ids].argmax()] == row.response
    found = evaluate(model, encoder, rows, "choice", batch_size=4)
    assert found == right / len(rows)


def test_choice_compares_where_the_choices_part(model, encoder, tokenizer):
    choices = ("very good film", "very bad film")
    prompt = [*encoder.prompt(Example("film?", "")), tokenizer.convert_tokens_to_ids("very")]
    scores = model(torch.tensor([prompt])).logits[0, -1]
    ids = tokenizer.convert_tokens_to_ids(["good", "bad"])
    likelier = choices[scores[ids].argmax()]
    rows = [Example("film?", likelier, choices)]
    assert evaluate(model, encoder, rows, "choice", batch_size=1) == 1
    # A choice that is the beginning of another differs from it at its end.
    rows = [Example("film?", "good", ("good", "good film"))]
    assert evaluate(model, encoder, rows, "choice", batch_size=1) in (0, 1)


@pytest.mark.parametrize("choices", [(), ("yes",), ("yes", "yes"), ("good film", "good yes", "no")])
def test_choices_that_cannot_be_compared_are_refused(model, encoder, choices):
    row = Example("film?", choices[0] if choices else "yes", choices)
    with pytest.raises(DataError, match="choices"):
        evaluate(model, encoder, [row], "choice", batch_size=1)


def test_numeric_reads_the_generated_answer(model, encoder, monkeypatch):
    monkeypatch.setattr(
        "lorasb_kernels.train.evaluation.generate",
        lambda model, encoder, prompts, limit: ["3 + 4 = 7 #### 7"] * len(prompts),
    )
    rows = [Example("x", "#### 7"), Example("x", "7.0"), Example("x", "#### 8")]
    assert evaluate(model, encoder, rows, "numeric", batch_size=2) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="holds no number"):
        evaluate(model, encoder, [Example("x", "y")], "numeric", batch_size=1)


@pytest.mark.parametrize(
    ("metric", "text", "rows", "share"),
    [
        ("math", r"x. The answer is: $\frac12$", ["\\boxed{0.5}", "The answer is: 2"], 1 / 2),
        ("answer", "the correct answer is NO, not yes", ["it is no", "it is yes"], 1 / 2),
    ],
)
def test_written_answers_are_judged_by_what_they_say(
    model, encoder, monkeypatch, metric, text, rows, share
):
    monkeypatch.setattr("lorasb_kernels.train.evaluation.generate", lambda *_: [text] * len(rows))
    examples = [Example("x", row, ("yes", "no"), "", row.split()[-1]) for row in rows]
    assert evaluate(model, encoder, examples, metric, batch_size=2) == share


def test_answers_end_at_a_stop_text(model, tokenizer):
    """And no batch is generated on when all of its answers have stopped."""
    prompts = [Encoder(tokenizer, 32).prompt(row) for row in sums(4)]
    free = generate(model, Encoder(tokenizer, 32, stop=()), prompts, 12)
    word = free[0].split()[3]
    stopping = Encoder(tokenizer, 32, stop=(word,))
    assert generate(model, stopping, prompts, 12) == [text.split(word)[0] for text in free]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, stopping, prompts[:1], 12)
    handle.remove()
    assert 0 < len(calls) < 12


def test_the_words_an_answer_begins_with_are_given_when_it_is_judged(tokenizer):
    encoder = Encoder(tokenizer, 32, response_prefix="very good")
    example = Example("film?", "")
    assert encoder.question(example) == [
        *encoder.prompt(example),
        *tokenizer("very good").input_ids,
    ]


@pytest.mark.parametrize(
    ("metric", "row"),
    [
        ("numeric", Example("x", "none")),
        ("math", Example("x", "5")),
        ("answer", Example("x", "maybe", ("yes", "no"))),
        ("answer", Example("x", "yes")),
        ("choice", Example("x", "yes")),
    ],
)
def test_rows_that_cannot_be_judged_are_known_before_there_is_a_model(encoder, metric, row):
    good = Example("x", "yes 7 \\boxed{7}", ("yes", "no"), answer="yes")
    check_rows(encoder, [good], metric)
    with pytest.raises(DataError, match="evaluation row 2: "):
        check_rows(encoder, [good, row], metric)


def test_generation_does_not_depend_on_the_batch(model, encoder):
    prompts = [encoder.prompt(row) for row in sums(6)]
    alone = [generate(model, encoder, [prompt], 5)[0] for prompt in prompts]
    assert generate(model, encoder, prompts, 5) == alone


def test_loss_is_the_mean_over_response_tokens(model, encoder):
    whole = evaluate(model, encoder, sums(9), "loss", batch_size=9)
    parts = evaluate(model, encoder, sums(9), "loss", batch_size=2)
    assert whole == pytest.approx(parts, rel=1e-5)


def test_classification_and_regression(bert, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    encoder = Encoder(tokenizer, 32)
    rows = reviews(10)
    model.eval()
    with torch.no_grad():
        logits = [
            model(torch.tensor([sample.input_ids])).logits[0] for sample in encoder.labelled(rows)
        ]
    expected = accuracy([row.argmax().item() for row in logits], [row.label for row in rows])
    assert evaluate(model, encoder, rows, "accuracy", batch_size=4) == expected
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1)
    scored = [Labelled(row.text, float(i)) for i, row in enumerate(rows)]
    assert -1 <= evaluate(model, encoder, scored, "pearson", batch_size=4) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model, encoder, training):
    model.train(training)
    evaluate(model, encoder, sums(3), "loss", batch_size=2)
    assert model.training is training
