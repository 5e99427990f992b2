r"""Whether two answers in LaTeX mean the same, as the MATH paper judges (arXiv:2103.03874).

Both are normalized and compared: fractions and roots with their braces, no
spaces, no `\left` and `\right`, no units, degrees, dollars or percent signs. In addition to the
paper's rules, numbers are compared as numbers (`0.25` and `\frac14`, `1,000` and
`1000`), tuples and lists member by member, and words with or without `\text{…}`.
"""

import re
from fractions import Fraction

# The order matters: later rules expect that earlier ones have been applied.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\(?=[A-Za-z])", r"\\"),  # a doubled backslash before a command
        (r"\\\\\s*", ";"),  # a new row
        (r"\\[!,;: ]|\n|~", ""),  # LaTeX's spaces
        (r"\\left(?![a-z])|\\right(?![a-z])", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\^\s*(\{\s*\\circ\s*\}|\\circ)", ""),  # degrees
        (r"\\?[$%]", ""),
        (r"\\(text|mbox|mathrm|textrm)\{\s+[^{}]*\}\s*$", ""),  # a unit on the right
        (r"\\(text|mbox|mathrm|textrm|textbf|textit|mathbf)\{([^{}]*)\}", r"\2"),
        (r"^\s*[A-Za-z]\w?\s*=(?!.*=)", ""),  # `x =`, but no chain of equations
        (r"\{,\}", ","),
        (r"\s+", ""),
        (r"\\sqrt(\[[^\]]*\])?([^{\[\\])", r"\\sqrt\1{\2}"),
        (r"\\frac([^{\\])", r"\\frac{\1}"),  # \frac1b and \frac12
        (r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"^([+-]?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    )
]
_INTEGER = r"\d+|\d{1,3}(?:,\d{3})+"
_DECIMAL = re.compile(rf"([+-]?(?:{_INTEGER})(?:\.\d*)?)")
_FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}")
_DIGITS = 40  # beyond them, numbers are compared as texts


def normalized(answer: str) -> str:
    """`answer`, normalized for comparison."""
    for pattern, replacement in _RULES:
        answer = pattern.sub(replacement, answer)
    return answer.removesuffix(".")


def number(answer: str) -> Fraction | None:
    """The value of a normalized decimal, fraction or mixed number; None for anything else."""
    if len(answer) > _DIGITS:
        return None
    if _DECIMAL.fullmatch(answer):
        return Fraction(answer.replace(",", ""))
    if not (parts := _FRACTION.fullmatch(answer)):
        return None
    sign, whole, numerator, denominator = parts.groups()
    if int(denominator) == 0:
        return None
    value = int(whole or 0) + Fraction(int(numerator), int(denominator))
    return -value if sign == "-" else value


def equivalent(first: str, second: str) -> bool:
    """Whether two answers mean the same."""
    first, second = normalized(first), normalized(second)
    if first == second:
        return True
    values = number(first), number(second)
    if None not in values:
        return values[0] == values[1]
    members = _members(first), _members(second)
    if not all(members) or len(members[0]) != len(members[1]):
        return False
    return all(map(equivalent, *members))


def _members(answer: str) -> list[str]:
    """Brackets and members of a tuple, interval or list; empty for anything else.

    The brackets are included, so that an open interval differs from a closed one.
    """
    enclosed = answer.startswith(("(", "[")) and answer.endswith((")", "]"))
    inner = answer[1:-1] if enclosed else answer
    members, depth, start = [], 0, 0
    for i, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            members.append(inner[start:i])
            start = i + 1
    if not members:
        return []
    members.append(inner[start:])
    return [answer[0], *members, answer[-1]] if enclosed else members


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}` of a text; None if there is none.

    `\boxed 5` is also read.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[text.index("box", start) :].removeprefix("boxed").removeprefix("box").lstrip()
    if not rest.startswith("{"):
        return (re.split(r"[\s$]", rest) or [""])[0] or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None
