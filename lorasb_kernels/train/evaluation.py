"""Evaluates a model on held-out rows: exact numbers, choices, classes, scores."""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import nn

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.data import Example, Labelled
from lorasb_kernels.train.encoding import Encoded, Encoder
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.loss import takes_logits_to_keep, token_losses

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_number(text: str) -> Fraction | None:
    """The number after the last `####`, else the last number of the text; None if there is none.

    Thousands separators, decimals and fractions are understood, so `1,200.0` equals `1200`.
    """
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = _NUMBER.findall(marked)
    if not numbers:
        return None
    number = numbers[0] if "####" in text else numbers[-1]
    numerator, _, denominator = number.replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of predictions that equal their label."""
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation of two or more classes (Gorodkin 2004); 0 when it is undefined."""
    classes = max(*predictions, *labels) + 1
    p = torch.nn.functional.one_hot(torch.tensor(predictions), classes).double()
    y = torch.nn.functional.one_hot(torch.tensor(labels), classes).double()
    p, y = p - p.mean(0), y - y.mean(0)
    spread = (p.square().sum() * y.square().sum()).sqrt()
    return ((p * y).sum() / spread).item() if spread > 0 else 0.0


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson correlation; 0 when either side is constant."""
    p, y = (torch.tensor(values, dtype=torch.float64) for values in (predictions, labels))
    p, y = p - p.mean(), y - y.mean()
    spread = p.norm() * y.norm()
    return (p @ y / spread).item() if spread > 0 else 0.0


CLASSIFICATION_METRICS = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson}

Progress = Callable[[Sequence], Iterator]


def evaluate(
    model: nn.Module,
    encoder: Encoder,
    rows: Sequence[Example] | Sequence[Labelled],
    metric: str,
    *,
    batch_size: int,
    max_new_tokens: int = 256,
    progress: Progress = iter,
) -> float:
    """The metric of `model` on `rows`; the model's mode is restored.

    Args:
        model: a causal language model, or a classifier for labelled rows.
        encoder: encodes the rows as in training.
        rows: examples for `loss`, `numeric`, `choice`; labelled texts for the others.
        metric: `loss` (mean over response tokens, nats), `numeric` (share of greedy answers
            whose final number is the response's), `choice` (share of examples whose likeliest
            choice is the response), `accuracy`, `matthews`, `pearson`.
        batch_size: samples per forward pass.
        max_new_tokens: length of a generated answer.
        progress: wraps the sequence of batches.

    Raises:
        DataError: rows that the metric cannot evaluate.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if metric == "loss":
                return _loss(model, encoder, rows, batch_size, progress)
            if metric == "numeric":
                return _numeric(model, encoder, rows, batch_size, max_new_tokens, progress)
            if metric == "choice":
                return _choice(model, encoder, rows, batch_size, progress)
            return _classified(model, encoder, rows, metric, batch_size, progress)
    finally:
        model.train(was_training)


def _batches(rows: Sequence, size: int, length: Callable) -> list[list]:
    """Rows in batches of similar length, longest first."""
    rows = sorted(rows, key=lambda row: -length(row))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _inputs(model: nn.Module, encoder: Encoder, samples: Sequence[Encoded]) -> dict:
    device = next(model.parameters()).device
    batch = Collator(encoder.pad_token_id)(samples)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _unlabelled(prompts: Sequence[list[int]]) -> list[Encoded]:
    return [Encoded(prompt, [IGNORED] * len(prompt)) for prompt in prompts]


def _loss(model, encoder, rows, batch_size, progress) -> float:
    total = tokens = 0.0
    samples = encoder.examples(rows)
    for batch in progress(_batches(samples, batch_size, lambda s: len(s.input_ids))):
        losses, labelled = token_losses(model, _inputs(model, encoder, batch))
        total += losses.sum().item()
        tokens += labelled.sum().item()
    return total / tokens


def _numeric(model, encoder, rows, batch_size, max_new_tokens, progress) -> float:
    right = 0
    asked = [(encoder.prompt(row.instruction), row.response) for row in rows]
    for batch in progress(_batches(asked, batch_size, lambda pair: len(pair[0]))):
        answers = generate(model, encoder, [prompt for prompt, _ in batch], max_new_tokens)
        for answer, (_, response) in zip(answers, batch, strict=True):
            expected = final_number(response)
            if expected is None:
                raise DataError(f"response {response!r} holds no number; expected one")
            right += final_number(answer) == expected
    return right / len(rows)


def generate(model, encoder: Encoder, prompts: Sequence[list[int]], max_new_tokens: int):
    """Greedy answers to tokenized prompts, as a list of texts."""
    inputs = _inputs(model, encoder, _unlabelled(prompts))
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=encoder.pad_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
    )
    answers = output[:, inputs["input_ids"].shape[1] :]
    return encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)


def _choice(model, encoder, rows, batch_size, progress) -> float:
    """Compares the choices at the first token where they differ: one pass per example."""
    asked = [_choice_prompt(encoder, row) for row in rows]
    right = 0
    for batch in progress(_batches(asked, batch_size, lambda item: len(item[0]))):
        inputs = _inputs(model, encoder, _unlabelled([prompt for prompt, _, _ in batch]))
        del inputs["labels"]
        last_only = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        logits = model(**inputs, **last_only).logits[:, -1]
        for scores, (_, tokens, answer) in zip(logits, batch, strict=True):
            right += scores[tokens].argmax().item() == answer
    return right / len(rows)


def _choice_prompt(encoder: Encoder, row: Example) -> tuple[list[int], list[int], int]:
    """Prompt up to where the choices differ, each choice's token there, index of the answer."""
    if len(set(row.choices)) < 2:
        raise DataError(f"choices are {row.choices!r}; the metric 'choice' needs two or more")
    choices = [encoder.response(choice) for choice in row.choices]
    shared = 0
    while len({choice[shared] for choice in choices}) == 1:
        shared += 1
    tokens = [choice[shared] for choice in choices]
    if len(set(tokens)) < len(tokens):
        raise DataError(
            f"choices {row.choices!r} do not all part at the same token; expected short labels"
        )
    prompt = encoder.prompt(row.instruction) + choices[0][:shared]
    return prompt, tokens, row.choices.index(row.response)


def _classified(model, encoder, rows, metric, batch_size, progress) -> float:
    predictions, labels = [], []
    samples = encoder.labelled(rows)
    for batch in progress(_batches(samples, batch_size, lambda s: len(s.input_ids))):
        inputs = _inputs(model, encoder, batch)
        labels += inputs.pop("labels").tolist()
        logits = model(**inputs).logits.float()
        predictions += (logits.squeeze(-1) if metric == "pearson" else logits.argmax(-1)).tolist()
    return CLASSIFICATION_METRICS[metric](predictions, labels)
