r"""What a written answer says: its number, its LaTeX, its choice.

MetaMathQA ends a response with "The answer is: …", GSM8K with "#### …", MATH puts it into
`\boxed{…}`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from lorasb_kernels.train.latex import last_boxed

STATED = "The answer is:"
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`, so that a model that continues with another question
    is evaluated on its answer to this one."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def final_number(text: str) -> Fraction | None:
    """The first number after the last "The answer is:", else after the last "####", else the
    last number of the text; None if there is none.

    Thousands separators, decimals and fractions are understood, so `1,200.0` equals `1200`.
    """
    marker = next((marker for marker in (STATED, "####") if marker in text), None)
    numbers = _NUMBER.findall(text.rpartition(marker)[2] if marker else text)
    if not numbers:
        return None
    found = numbers[0] if marker else numbers[-1]
    numerator, _, denominator = found.replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def final_latex(text: str) -> str | None:
    r"""The text after the last "The answer is:" on its line, else the content of the last
    `\boxed{…}`; None if there is neither."""
    if STATED not in text:
        return last_boxed(text)
    stated = text.rpartition(STATED)[2].strip().split("\n")[0].strip().removesuffix(".").strip()
    return last_boxed(stated) or stated or None


def chosen(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names first, ignoring case; None if it names none.

    If one choice begins with another, the longer one is taken.
    """
    longest_first = sorted(choices, key=len, reverse=True)
    pattern = "|".join(map(re.escape, (choice.lower() for choice in longest_first)))
    found = re.search(pattern, text.lower()) if pattern else None
    return next((c for c in choices if c.lower() == found[0]), None) if found else None
