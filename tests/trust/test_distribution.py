"""What is distributed: the package and nothing else, built from its own files, offline."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_file
from pathlib import Path

import pytest

from lorasb_kernels import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE", "NOTICE")
BUILD = """
import sys
def refuse_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"the build asks the network for {arguments}")
sys.addaudithook(refuse_network)
from setuptools import build_meta
build_meta.build_wheel("dist")
build_meta.build_sdist("dist")
"""


def package_files() -> set[str]:
    """The files of the package, except built ones."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lorasb_kernels").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[set[str], set[str], Path]:
    """Names in the wheel and in the source distribution, and the unpacked wheel."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in (
        "lorasb_kernels",
        "csrc",
        "tests",
        "tools",
    ):  # the last two must not be in the result
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc", "*.so"))
    (folder / "lorasb_kernels" / "secrets.env").write_text("TOKEN=1")
    completed = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=folder,
        env={**os.environ, "LORASB_SKIP_CUDA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    assert wheel.name == f"lorasb_kernels-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    return in_wheel, in_sdist, folder / "wheel"


def test_the_wheel_holds_the_package_and_its_licenses(built):
    names, _, _ = built
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == package_files()
    listed = {name.partition("/")[2] for name in metadata}
    assert listed >= {"METADATA", "RECORD", "licenses/LICENSE", "licenses/NOTICE"}
    assert listed <= {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"} | {
        "licenses/LICENSE",
        "licenses/NOTICE",
    }


def test_the_wheel_says_what_it_is_and_what_it_needs(built):
    _, _, wheel = built
    (folder,) = wheel.glob("*.dist-info")
    with (folder / "METADATA").open() as file:
        found = message_from_file(file)
    assert (found["Name"], found["Version"]) == ("lorasb_kernels", __version__)
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    needs = found.get_all("Requires-Dist")
    core = {re.match(r"[\w-]+", need)[0] for need in needs if "extra ==" not in need}
    assert core == {"torch", "triton", "numpy", "safetensors"}
    extras = {"train", "data", "demo", "bench", "quantized", "docs", "heuristics", "test", "full"}
    assert set(found.get_all("Provides-Extra")) == extras
    entry = (folder / "entry_points.txt").read_text()
    assert entry == "[console_scripts]\nlorasb = lorasb_kernels.cli.main:main\n"


def test_the_version_stands_once():
    for name in ("setup.py", "pyproject.toml"):
        assert __version__ not in (ROOT / name).read_text()


def test_the_source_distribution_holds_what_builds_it(built):
    _, names, _ = built
    generated = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names - generated == package_files() | sources | set(SOURCES)


def test_the_wheel_works_by_itself(built):
    _, _, wheel = built
    code = (
        "import lorasb_kernels, torch; from lorasb_kernels.train.settings_file import load_preset;"
        "from lorasb_kernels.functional import lorasb_linear as f; eye = torch.eye(4);"
        "print(lorasb_kernels.__file__, load_preset('arithmetic')['r'],"
        " f(eye, eye, eye, eye, eye).trace())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=wheel,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith(str(wheel))


def test_what_is_built_in_is_listed():
    """A library that `csrc` links or a foreign header it includes is named in NOTICE."""
    notice = (ROOT / "NOTICE").read_text()
    build = (ROOT / "csrc" / "build.py").read_text()
    assert ("-lcudart_static" in build) == ("cudart_static" in notice)
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h")]
    included = {
        line.partition("<")[2].partition("/")[0]
        for path in sources
        for line in path.read_text().splitlines()
        if line.startswith("#include <") and "/" in line
    }
    assert included == {"torch"}
