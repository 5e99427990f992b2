"""The documentation says what the code says."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))


def documented():
    """Every public class, method and function, by its full name."""
    for module in BUILD["MODULES"]:
        for name, value in BUILD["public"](module).items():
            yield f"{module}.{name}", value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{module}.{name}.{method}", function


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_arguments_of_a_docstring_are_those_of_the_signature(name):
    docstring = inspect.getdoc(DOCUMENTED[name])
    assert docstring, f"{name} has no docstring"
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return
    entries = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.MULTILINE)
    described = {argument for entry in entries for argument in entry.split(", ")}
    taken = set(inspect.signature(DOCUMENTED[name]).parameters) - {"self", "cls"}
    assert described == taken


def test_the_api_page_is_up_to_date():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == BUILD["page"](), "docs/api.md is out of date; `make docs` writes it"


def test_the_settings_page_is_up_to_date():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == BUILD["settings_page"](), "run `make docs`"


def test_every_line_of_the_ecosystem_page_names_a_test_that_exists():
    page = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    rows = [row for row in page.partition("|---|")[2].splitlines() if row.startswith("| ")]
    assert len(rows) > 20
    for row in rows:
        named = re.search(r"\| `(tests/[\w/]+\.py)` \|$", row)
        assert named, row
        assert (ROOT / named[1]).exists(), row


@pytest.mark.slow
def test_the_reference_is_built_from_the_docstrings(tmp_path):
    BUILD["build_reference"](tmp_path)
    for module in BUILD["MODULES"]:
        page = (tmp_path / Path(*module.split("."))).with_suffix(".html").read_text("utf-8")
        for name, value in BUILD["public"](module).items():
            assert f'id="{name}"' in page, f"{module}.{name} is not in the reference"
            words = BUILD["first_words"](value).partition("`")[0]
            assert words[:20].rstrip() in page
