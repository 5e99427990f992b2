"""docs/performance_model.md is what the model says today, readable, and marked as prediction."""

import re

from bench.model_page import PATH, page


def test_the_page_is_up_to_date():
    assert PATH.read_text() == page(), "run `python -m bench.model_page`"


def test_the_page_is_readable_and_marked():
    text = PATH.read_text()
    assert "**Everything on this page is a prediction." in text
    lines = [line for line in text.splitlines() if "github.com" not in line]
    assert max(map(len, lines)) <= 100
    assert len(re.findall(r"^### ", text, re.M)) >= 6
