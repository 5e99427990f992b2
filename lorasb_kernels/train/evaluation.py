"""Judging a model on held-out rows: written answers, choices, classes, scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train import answers
from lorasb_kernels.train.batching import Collator
from lorasb_kernels.train.encoding import Encoded, Encoder
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.latex import equivalent
from lorasb_kernels.train.loss import takes_logits_to_keep, token_losses
from lorasb_kernels.train.metrics import CLASSIFICATION_METRICS
from lorasb_kernels.train.samples import Example, Labelled
from lorasb_kernels.utils.fields import shown

Progress = Callable[[Sequence], Iterator]


@dataclass(frozen=True)
class Written:
    """A metric of generated answers: the share that says what the row's response says.

    Args:
        expected: what the row's response says; None for a row that cannot be judged.
        said: what an answer to that row says.
        same: whether they are the same.
        kind: what an unusable response lacks, for the error.
        tokens: length of an answer, where none is given.
    """

    expected: Callable[[Example], Any]
    said: Callable[[Example, str], Any]
    same: Callable[[Any, Any], bool]
    kind: str
    tokens: int


def _label(row: Example) -> str | None:
    return row.label if row.label in row.choices else None


WRITTEN = {
    "numeric": Written(
        lambda row: answers.final_number(row.response),
        lambda row, text: answers.final_number(text),
        lambda said, expected: said == expected,
        "number",
        256,
    ),
    "math": Written(
        lambda row: answers.final_latex(row.response),
        lambda row, text: answers.final_latex(text),
        lambda said, expected: said is not None and equivalent(said, expected),
        "\\boxed{…} and no 'The answer is:'",
        512,
    ),
    "answer": Written(
        _label,
        lambda row, text: answers.chosen(text, row.choices),
        lambda said, expected: said == expected,
        "choice of its row",
        32,
    ),
}


def evaluate(
    model: nn.Module,
    encoder: Encoder,
    rows: Sequence[Example] | Sequence[Labelled],
    metric: str,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    progress: Progress = iter,
) -> float:
    """The metric of `model` on `rows`; the model's mode is restored.

    Args:
        model: a causal language model, or a classifier for labelled rows.
        encoder: encodes the rows as in training.
        rows: examples for `loss`, `numeric`, `choice`; labelled texts for the others.
        metric: `loss` (mean over response tokens, nats); of greedy answers, the share whose final
            number (`numeric`), final LaTeX (`math`) or first named choice (`answer`) is the
            response's; `choice` (share of examples whose likeliest choice is the response);
            `accuracy`, `matthews`, `pearson`.
        batch_size: samples per forward pass.
        max_new_tokens: length of a generated answer; None: 256 for `numeric`, 512 for `math`, 32
            for `answer`.
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
            if metric in WRITTEN:
                tokens = max_new_tokens or WRITTEN[metric].tokens
                return _written(model, encoder, rows, metric, batch_size, tokens, progress)
            if metric == "choice":
                return _choice(model, encoder, rows, batch_size, progress)
            return _classified(model, encoder, rows, metric, batch_size, progress)
    finally:
        model.train(was_training)


def check_rows(encoder: Encoder, rows: Sequence[Example] | Sequence[Labelled], metric: str) -> None:
    """Checks that `evaluate` can judge the rows, without a model.

    Raises:
        DataError: it cannot; the message counts the rows from 1.
    """
    for number, row in enumerate(rows, 1):
        try:
            if metric in WRITTEN:
                _expected(row, metric)
            elif metric == "choice":
                _choice_prompt(encoder, row)
        except DataError as error:
            raise DataError(f"evaluation row {number}: {error}") from error
    if metric == "loss" and rows and not encoder.examples(rows):
        raise DataError(f"no evaluation row fits into max_length = {encoder.max_length} tokens")


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


def _written(model, encoder, rows, metric, batch_size, max_new_tokens, progress) -> float:
    judge, right = WRITTEN[metric], 0
    asked = [(encoder.question(row), row, _expected(row, metric)) for row in rows]
    for batch in progress(_batches(asked, batch_size, lambda item: len(item[0]))):
        texts = generate(model, encoder, [prompt for prompt, _, _ in batch], max_new_tokens)
        for text, (_, row, expected) in zip(texts, batch, strict=True):
            right += judge.same(judge.said(row, text), expected)
    return right / len(rows)


def _expected(row: Example, metric: str) -> Any:
    expected = WRITTEN[metric].expected(row)
    if expected is None:
        raise DataError(
            f"response {shown(row.response)} holds no {WRITTEN[metric].kind}; the metric "
            f"{metric!r} needs one"
        )
    return expected


class _Stops:
    """Ends an answer at a stop text; transformers' own criterion takes byte-level vocabularies."""

    TOKENS = 16  # of an answer's end, in which a stop text is looked for

    def __init__(self, encoder: Encoder, prompt_length: int):
        self.encoder, self.start = encoder, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        ends = input_ids[:, max(self.start, input_ids.shape[1] - self.TOKENS) :]
        texts = self.encoder.tokenizer.batch_decode(ends, skip_special_tokens=True)
        stopped = [any(stop in text for stop in self.encoder.stops) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


def generate(
    model: nn.Module, encoder: Encoder, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to tokenized prompts, each up to the first of the encoder's stop texts."""
    inputs = _inputs(model, encoder, _unlabelled(prompts))
    criteria = [_Stops(encoder, inputs["input_ids"].shape[1])] if encoder.stops else None
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=encoder.pad_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        stopping_criteria=criteria,
    )
    texts = encoder.tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answers.until(text, encoder.stops) for text in texts]


def _choice(model, encoder, rows, batch_size, progress) -> float:
    """Compares the choices at the first token where they part: one pass per example."""
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
    """Tokens up to where the choices part, each choice's token there, index of the answer."""
    if len(set(row.choices)) < 2:
        raise DataError(f"choices are {row.choices!r}; the metric 'choice' needs two or more")
    sequences = [encoder.sequence(row, candidate) for candidate in row.candidates()]
    if len(set(map(tuple, sequences))) < 2:
        raise DataError(f"choices {row.choices!r} are the same tokens; expected different ones")
    shared = 0
    while len({sequence[shared] for sequence in sequences}) == 1:
        shared += 1
    tokens = [sequence[shared] for sequence in sequences]
    if len(set(tokens)) < len(tokens):
        raise DataError(
            f"choices {row.choices!r} do not all part at the same token; expected short labels"
        )
    return sequences[0][:shared], tokens, row.choices.index(row.label)


def _classified(model, encoder, rows, metric, batch_size, progress) -> float:
    predictions, labels = [], []
    samples = encoder.labelled(rows)
    for batch in progress(_batches(samples, batch_size, lambda s: len(s.input_ids))):
        inputs = _inputs(model, encoder, batch)
        labels += inputs.pop("labels").tolist()
        logits = model(**inputs).logits.float()
        predictions += (logits.squeeze(-1) if metric == "pearson" else logits.argmax(-1)).tolist()
    return CLASSIFICATION_METRICS[metric](predictions, labels)
