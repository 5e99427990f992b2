"""News headlines labelled sarcastic or not: read, deduplicated, split."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from lorasb_kernels.train.demo.assets import evals_member

MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
VALIDATION_SHARE = TEST_SHARE = 0.1


class Headline(NamedTuple):
    """One headline; `label` is 1 when it is sarcastic, else 0."""

    text: str
    label: int


class Split(NamedTuple):
    """Three disjoint lists of headlines, in an order that depends only on their text."""

    train: list[Headline]
    validation: list[Headline]
    test: list[Headline]


def parse(jsonl: str) -> list[Headline]:
    """Headlines of the `evals` file, each text once; texts with both labels are left out."""
    labels: dict[str, set[int]] = {}
    for line in jsonl.splitlines():
        row = json.loads(line)
        text = " ".join(row["input"][-1]["content"].split())
        labels.setdefault(text, set()).add(int(row["ideal"]))
    return [Headline(text, *label) for text, label in labels.items() if len(label) == 1]


def split(headlines: list[Headline]) -> Split:
    """Splits by a digest of the text, so a headline's part does not depend on the others."""

    def digest(headline: Headline) -> str:
        return hashlib.sha256(headline.text.casefold().encode()).hexdigest()

    parts = Split([], [], [])
    for headline in sorted(headlines, key=digest):
        position = int(digest(headline)[-8:], 16) / 2**32
        if position < TEST_SHARE:
            parts.test.append(headline)
        elif position < TEST_SHARE + VALIDATION_SHARE:
            parts.validation.append(headline)
        else:
            parts.train.append(headline)
    return parts


def load(cache: Path | None = None) -> Split:
    """The headlines, fetched at first use."""
    return split(parse(evals_member(MEMBER, cache)))
