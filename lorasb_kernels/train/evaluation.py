"""Judging a model on held-out rows: exact numbers, choices, classes, scores."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import nn

from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.data import (
    IGNORED,
    DataError,
    Encoded,
    Example,
    Labelled,
    encode_examples,
    encode_labelled,
    prompt_ids,
    response_ids,
)
from lorasb_kernels.train.loss import token_losses

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_number(text: str) -> Fraction | None:
    """The number after the last `####`, else the last number of the text; None without one.

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


Progress = Callable[[Sequence], Iterator]


def evaluate(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Example] | Sequence[Labelled],
    metric: str,
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int = 256,
    progress: Progress = iter,
) -> float:
    """The metric of `model` on `rows`; the model's mode is restored.

    Args:
        model: a causal language model, or a classifier for labelled rows.
        tokenizer: its tokenizer.
        rows: examples for `loss`, `numeric`, `choice`; labelled texts for the others.
        metric: `loss` (mean over response tokens, nats), `numeric` (share of greedy answers
            whose final number is the response's), `choice` (share of examples whose likeliest
            choice is the response), `accuracy`, `matthews`, `pearson`.
        batch_size: samples a forward pass.
        max_length: tokens a sample.
        max_new_tokens: length of a generated answer.
        progress: wraps the sequence of batches.

    Raises:
        DataError: rows that the metric cannot judge.
    """
    was_training = model.training
    model.eval()
    judge = {"loss": _loss, "numeric": _numeric, "choice": _choice}.get(metric)
    try:
        with torch.inference_mode():
            if judge is None:
                return _classified(model, tokenizer, rows, metric, batch_size, max_length, progress)
            limits = (max_length, max_new_tokens)
            return judge(model, tokenizer, rows, batch_size, limits, progress)
    finally:
        model.train(was_training)


def _batches(rows: Sequence, size: int, length: Callable) -> list[list]:
    """Rows in batches of similar length, longest first."""
    rows = sorted(rows, key=lambda row: -length(row))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _on_device(model: nn.Module, collator: Collator, samples: Sequence[Encoded]) -> dict:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collator(samples).items()}


def _loss(model, tokenizer, rows, batch_size, limits, progress) -> float:
    samples = encode_examples(tokenizer, rows, limits[0])
    collator = Collator(tokenizer.pad_token_id)
    total = tokens = 0.0
    for batch in progress(_batches(samples, batch_size, lambda s: len(s.input_ids))):
        losses, counted = token_losses(model, _on_device(model, collator, batch))
        total += losses.sum().item()
        tokens += counted.sum().item()
    return total / tokens


def _numeric(model, tokenizer, rows, batch_size, limits, progress) -> float:
    right = 0
    asked = [(prompt_ids(tokenizer, row.instruction)[-limits[0] :], row.response) for row in rows]
    for batch in progress(_batches(asked, batch_size, lambda pair: len(pair[0]))):
        answers = generate(model, tokenizer, [prompt for prompt, _ in batch], limits[1])
        for answer, (_, response) in zip(answers, batch, strict=True):
            expected = final_number(response)
            if expected is None:
                raise DataError(f"response {response!r} holds no number; expected one")
            right += final_number(answer) == expected
    return right / len(rows)


def generate(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers to tokenized prompts."""
    samples = [Encoded(prompt, [IGNORED] * len(prompt)) for prompt in prompts]
    batch = _on_device(model, Collator(tokenizer.pad_token_id), samples)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def _choice(model, tokenizer, rows, batch_size, limits, progress) -> float:
    """Compares the choices at the first token where they part: one pass an example."""
    asked = [_choice_prompt(tokenizer, row) for row in rows]
    collator = Collator(tokenizer.pad_token_id)
    right = 0
    for batch in progress(_batches(asked, batch_size, lambda item: len(item[0]))):
        samples = [Encoded(prompt, [IGNORED] * len(prompt)) for prompt, _, _ in batch]
        inputs = _on_device(model, collator, samples)
        del inputs["labels"]
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        for scores, (_, tokens, answer) in zip(logits, batch, strict=True):
            right += scores[tokens].argmax().item() == answer
    return right / len(rows)


def _choice_prompt(tokenizer, row: Example) -> tuple[list[int], list[int], int]:
    """Prompt up to where the choices part, each choice's token there, index of the answer."""
    if len(row.choices) < 2:
        raise DataError(f"choices are {row.choices!r}; the metric 'choice' needs two or more")
    choices = [response_ids(tokenizer, choice) for choice in row.choices]
    shared = 0
    while len({tuple(choice[: shared + 1]) for choice in choices}) == 1:
        shared += 1
    tokens = [choice[shared] for choice in choices]
    if len(set(tokens)) < len(tokens):
        raise DataError(
            f"choices {row.choices!r} do not all part at the same token; expected short labels"
        )
    prompt = prompt_ids(tokenizer, row.instruction) + choices[0][:shared]
    return prompt, tokens, row.choices.index(row.response)


def _classified(model, tokenizer, rows, metric, batch_size, max_length, progress) -> float:
    samples = encode_labelled(tokenizer, rows, max_length)
    collator = Collator(tokenizer.pad_token_id)
    predictions, labels = [], []
    for batch in progress(_batches(samples, batch_size, lambda s: len(s.input_ids))):
        inputs = _on_device(model, collator, batch)
        labels += inputs.pop("labels").tolist()
        logits = model(**inputs).logits.float()
        predictions += (logits.squeeze(-1) if metric == "pearson" else logits.argmax(-1)).tolist()
    if not all(map(math.isfinite, predictions)):
        return math.nan
    return {"accuracy": accuracy, "matthews": matthews, "pearson": pearson}[metric](
        predictions, labels
    )
