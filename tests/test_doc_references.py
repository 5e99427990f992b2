"""What the pages and comments name exists: links, files, modules, commands and their options."""

import argparse
import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from lorasb_kernels.cli.main import build_parser
from tests.models import batches, build

ROOT = Path(__file__).parents[1]
FOLDERS = ("lorasb_kernels", "csrc", "bench", "docs", "tests", "examples", "tools")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".md")
ELSEWHERE = {"table.md", "convert_lora_to_gguf.py"}  # written by a command; llama.cpp's
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
    ]
)
SOURCES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
)
FILES = {f"/{path.relative_to(ROOT).as_posix()}" for path in SOURCES} | {"/setup.py"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text_of(page))
    for link in (markdown or html for markdown, html in links):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_every_folder_and_module_that_is_named_exists(page):
    for name in re.findall(r"`([\w/]+/)`", text_of(page)):
        if name.split("/")[0] in FOLDERS and name != "bench/results/":
            assert (ROOT / name).is_dir(), name
    for name in re.findall(r"(?<![\w.])((?:lorasb_kernels|bench|tests)(?:\.\w+)+)", text_of(page)):
        if f"/{name}" not in FILES and name.rpartition(".")[2] not in ("egg", "git"):
            assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass  # the part before the last dot is no package, but may be a module
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_every_source_file_that_is_named_exists(folder):
    """In pages, comments and docstrings alike, by its path or the end of it."""
    here = PAGES if folder == "." else [p for p in SOURCES if ROOT / folder in p.parents]
    missing = []
    for path in here:
        for name in re.findall(r"`([\w./-]+)`", text_of(path)):
            if name.endswith(SUFFIXES) and name not in ELSEWHERE and not is_a_file(name):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def is_a_file(name: str) -> bool:
    return any(file.endswith(f"/{name}") for file in FILES)


@every_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for name in re.findall(r"(?:`|^ *)make ([\w-]+)", text_of(page), re.MULTILINE):
        assert name in targets, name


@every_page
def test_every_command_and_its_options_exist(page):
    (commands,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    text = text_of(page).replace("\\\n", " ")
    for name, rest in re.findall(r"(?:`|^ *)lorasb ([a-z][a-z-]*)([^`\n]*)", text, re.MULTILINE):
        assert name in commands, name
        known = commands[name]._option_string_actions
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest.partition("#")[0]):
            assert option in known, f"lorasb {name} {option}"


def test_the_readme_is_short_and_its_example_runs(tmp_path, monkeypatch):
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 120
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("base")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    hub_id = '"HuggingFaceTB/SmolLM2-135M"'
    assert hub_id in example
    trained = []
    exec(
        example.replace(hub_id, '"base"').replace("r=16", "r=4"),
        {"samples": batches("llama"), "train": trained.append},
    )
    names = {n for n, parameter in trained[0].named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.endswith("lora_R") for name in names)
    assert Path("adapter/adapter.safetensors").exists()


def test_the_picture_is_what_its_script_draws(tmp_path):
    drawn = tmp_path / "adapter_path.svg"
    runpy.run_path(str(ROOT / "docs" / "adapter_path.py"))["draw"](drawn)
    committed = ROOT / "docs" / "figures" / "adapter_path.svg"
    assert labels(drawn) == labels(committed), "`python docs/adapter_path.py` draws it"


def labels(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)<", text_of(picture))
