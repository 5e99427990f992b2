"""`CITATION.cff`, `docs/citing.md`, the README and the package say the same."""

import re
from pathlib import Path

import yaml

from lorasb_kernels import __version__

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_package():
    assert CITATION["version"] == __version__
    assert f"version = {{{__version__}}}" in PAGE


def test_the_license_and_the_authors_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{CITATION["license"]}"' in project
    assert [f'{{ name = "{one["name"]}" }}' in project for one in CITATION["authors"]] == [True]


def test_the_papers_are_those_of_the_page_and_the_readme():
    papers = CITATION["references"]
    number = re.compile(r"\d{4}\.\d{5}")
    named = [number.search(paper["url"])[0] for paper in papers]
    assert number.findall(PAGE) == named
    assert set(named) <= set(number.findall(README))
    entries = PAGE.split("@")[1:]
    for paper, entry in zip(papers, entries, strict=False):
        assert f"{{{paper['title']}}}" in entry
        assert f"{{{paper['year']}}}" in entry
        authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
        assert f"{{{authors}}}" in entry.replace(r"{\l}", "ł")
    assert len(entries) == len(papers) + 1  # the library itself
