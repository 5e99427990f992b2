"""The documentation says what the code says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorasb_kernels

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
MODULES = (
    "lorasb_kernels",
    "lorasb_kernels.functional",
    "lorasb_kernels.init",
    "lorasb_kernels.nn",
    "lorasb_kernels.quantized",
    "lorasb_kernels.optim",
    "lorasb_kernels.integrations.peft",
)


def public(module):
    """The names of a module's `__all__` and what they are, submodules left out."""
    module = __import__(module, fromlist=["_"])
    objects = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in objects.items() if callable(value)}


def documented():
    """Every public class, method and function, by its full name."""
    for module in MODULES:
        for name, value in public(module).items():
            yield f"{module}.{name}", value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{module}.{name}.{method}", function


DOCUMENTED = dict(documented())


def first_sentence(value):
    paragraph = inspect.getdoc(value).split("\n\n")[0]
    return " ".join(paragraph.split())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_arguments_of_a_docstring_are_those_of_the_signature(name):
    docstring = inspect.getdoc(DOCUMENTED[name])
    assert docstring, f"{name} has no docstring"
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return
    entries = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.MULTILINE)
    described = [argument for entry in entries for argument in entry.split(", ")]
    signature = inspect.signature(DOCUMENTED[name]).parameters
    assert set(described) <= set(signature), f"{name} describes arguments that it does not take"
    assert set(signature) - {"self", "cls"} <= set(described), f"{name} leaves arguments out"


def test_the_list_of_public_names_is_up_to_date():
    expected = []
    for module in MODULES:
        expected += [f"## `{module}`", "", "| name | what it is |", "|---|---|"]
        rows = public(module).items()
        expected += [f"| `{name}` | {first_sentence(value)} |" for name, value in rows] + [""]
    listed = API.read_text(encoding="utf-8")
    listed = listed[listed.index("## `") :].splitlines()
    assert listed == expected[:-1], "\n".join(["docs/api.md should read:", *expected])


def test_every_line_of_the_ecosystem_page_names_a_test_that_exists():
    page = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    rows = [row for row in page.partition("|---|")[2].splitlines() if row.startswith("| ")]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"\| `(tests/[\w/]+\.py)` \|$", row), row
        assert (ROOT / re.findall(r"tests/[\w/]+\.py", row)[-1]).exists(), row


@pytest.mark.slow
def test_the_reference_is_built_from_the_docstrings(tmp_path):
    makefile = ["make", "--silent", "docs", "--dry-run", "--assume-old=.venv/test.stamp"]
    done = subprocess.run(makefile, cwd=ROOT, check=True, capture_output=True, text=True)
    command = done.stdout.replace(".venv/bin/python", sys.executable).replace("\\\n", " ")
    command = command.replace("out/docs", str(tmp_path)).split()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for module in MODULES:
        page = (tmp_path / Path(*module.split("."))).with_suffix(".html").read_text("utf-8")
        for name, value in public(module).items():
            assert f'id="{name}"' in page, f"{module}.{name} is not in the reference"
            words = first_sentence(value).split("`")[0].strip()
            assert words.split("[")[0][:20].rstrip() in page
    assert lorasb_kernels.__version__ in (tmp_path / "lorasb_kernels.html").read_text("utf-8")
