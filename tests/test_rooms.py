"""The rules of the rooms (CONTRIBUTING.md), read from the sources; and each rule, broken once.

A rule takes the sources of the package, one text per module, and returns the violations.
"""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasb_kernels import _HOME
from lorasb_kernels.ops.triton import IMPLEMENTATIONS

ROOT = Path(__file__).parents[1]
PACKAGE = "lorasb_kernels"

# A room imports only from the lines below its own; the rooms of one line do not import each other.
ROOMS = (
    ("cli",),
    ("train",),
    ("integrations", "optim", "profiling"),
    ("adaptation", "base_model", "description"),
    ("io",),
    ("init",),
    ("targets",),
    ("nn",),
    ("functional",),
    ("config",),
    ("ops",),
    ("quantization", "hardware"),
    ("linear_layers",),
    ("utils",),
)
LINE = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}
BACKENDS = ("reference", "triton", "extension")  # in ops; `extension` loads the CUDA library
NOT_INSTALLED = ("bench", "csrc", "docs", "examples", "setup", "tests", "tools")

# `factor_gradient` runs the kernel of `sign_accumulate`, a mode of that of `sign_gradient`;
# `shrink_group` is `shrink` of several layers.
CUDA_TWIN = {"factor_gradient": "sign_accumulate"}
CUDA_FILE = {"sign_accumulate": "sign_gradient", "shrink_group": "shrink"}


def sources() -> dict[str, str]:
    """The text of every module of the package."""
    texts = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return texts


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@functools.cache
def import_nodes(text: str) -> list[ast.Import | ast.ImportFrom]:
    kinds = (ast.Import, ast.ImportFrom)
    return [node for node in ast.walk(parsed(text)) if isinstance(node, kinds)]


def imports(texts: dict[str, str], module: str) -> Iterator[str]:
    """What a module imports anywhere in it; a name from the package as the module it is in."""
    for node in import_nodes(texts[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                home = _HOME.get(alias.name, full) if node.module == PACKAGE else node.module
                yield full if full in texts else home


def room_of(module: str) -> str | None:
    """The room of a module of the package; None for the package itself and what is outside."""
    package, _, inner = module.partition(".")
    return inner.split(".")[0] or None if package == PACKAGE else None


def upward_imports(texts: dict[str, str]) -> list[str]:
    found = []
    for module in texts:
        room = room_of(module)
        if room is not None and room not in LINE:
            found.append(f"{module} is in no room of the list")
            continue
        for imported in imports(texts, module):
            other = room_of(imported)
            if None in (room, other) or room == other:
                continue
            if LINE.get(other, -1) <= LINE[room]:
                found.append(f"{module} imports {imported}")
    return found


def circles(texts: dict[str, str]) -> list[str]:
    graph = {module: set(imports(texts, module)) & texts.keys() - {module} for module in texts}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def backend_of(module: str) -> str | None:
    parts = module.split(".")
    is_backend = parts[:2] == [PACKAGE, "ops"] and len(parts) > 2 and parts[2] in BACKENDS
    return parts[2] if is_backend else None


def reached(texts: dict[str, str], module: str) -> set[str]:
    """What a module imports, what that imports, and so on."""
    seen, todo = set(), [module]
    while todo:
        for imported in imports(texts, todo.pop()):
            if imported not in seen:
                seen.add(imported)
                if imported in texts:
                    todo.append(imported)
    return seen


def mixed_backends(texts: dict[str, str]) -> list[str]:
    found = []
    for module in texts:
        own = backend_of(module)
        if own is None:
            continue
        for imported in reached(texts, module):
            needs_triton = imported.split(".")[0] == "triton" and own != "triton"
            if needs_triton or backend_of(imported) not in (None, own):
                found.append(f"{module} reaches {imported}")
    return found


def outside_imports(texts: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module in texts
        for imported in imports(texts, module)
        if imported.split(".")[0] in NOT_INSTALLED
    ]


def repository_lookups(texts: dict[str, str]) -> list[str]:
    """Strings, except docstrings, that name git or the folder of the documentation."""
    found = []
    for module, text in texts.items():
        tree = parsed(text)
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if id(node) in documentation:
                continue
            if re.search(r"rev-parse|^git$|\.git\b|^docs$|\bdocs/", node.value):
                found.append(f"{module} says {node.value!r}")
    return found


def operations(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Each operation with the module that defines it."""
    return [
        (node.args[0].value, module)
        for module, text in texts.items()
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BackendOperator"
    ]


def incomplete_operations(texts: dict[str, str]) -> list[str]:
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text("utf-8")
    references = functions(texts[f"{PACKAGE}.ops.reference"])
    found = []
    for operation, module in operations(texts):
        if module != f"{PACKAGE}.ops.{operation}":
            found.append(f"{operation} is defined in {module}")
        if operation not in references:
            found.append(f"{operation} has no reference")
        file, _, function = IMPLEMENTATIONS.get(operation, "").partition(".")
        if function not in functions(texts.get(f"{PACKAGE}.ops.triton.{file}", "")):
            found.append(f"{operation} has no Triton implementation")
        twin = CUDA_TWIN.get(operation, operation)
        kernel = ROOT / "csrc" / f"{CUDA_FILE.get(twin, twin)}.cu"
        if f'm.impl("{twin}_cuda"' not in bindings or not kernel.exists():
            found.append(f"{operation} has no CUDA implementation")
        if not (ROOT / "tests" / "ops" / f"test_{operation}.py").exists():
            found.append(f"{operation} has no test file")
    return found


def functions(text: str) -> set[str]:
    return {node.name for node in parsed(text).body if isinstance(node, ast.FunctionDef)}


RULES = (
    upward_imports,
    circles,
    mixed_backends,
    outside_imports,
    repository_lookups,
    incomplete_operations,
)
SOURCES = sources()


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule):
    assert rule(SOURCES) == []


def test_every_room_is_there_and_every_operation_is_found():
    assert {room_of(module) for module in SOURCES} - {None} == LINE.keys()
    assert {operation for operation, _ in operations(SOURCES)} == IMPLEMENTATIONS.keys()
    assert len(IMPLEMENTATIONS) >= 8


def test_contributing_shows_the_same_rooms():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = page.partition("| room | what |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()]
    assert tuple(tuple(re.findall(r"`(\w+)`", row)) for row in rows) == ROOMS


@pytest.mark.parametrize(
    ("rule", "module", "line"),
    [
        (upward_imports, "nn.linear", "import lorasb_kernels.init.methods"),
        (upward_imports, "ops.shrink", "def late():\n    from lorasb_kernels.nn import linear"),
        (upward_imports, "init.methods", "from lorasb_kernels import adapt"),
        (upward_imports, "io.hub", "from lorasb_kernels.optim import packed_cores"),
        (upward_imports, "rooms", "A = 1"),
        (circles, "init.svd.orthonormal", "from lorasb_kernels.init.svd import truncated"),
        (mixed_backends, "ops.reference", "import triton"),
        (mixed_backends, "ops.reference", "from lorasb_kernels.ops import extension"),
        (mixed_backends, "ops.bitplanes", "from lorasb_kernels.ops.triton import projection"),
        (mixed_backends, "ops.triton.expand", "from lorasb_kernels.ops import reference"),
        (mixed_backends, "ops.extension", "from lorasb_kernels.ops.reference import shrink"),
        (outside_imports, "cli.tune", "from bench import report"),
        (outside_imports, "ops.tune", "import tests.formulas"),
        (repository_lookups, "cli.main", 'run(["git", "log"])'),
        (repository_lookups, "utils.files", "COMMAND = 'rev-parse HEAD'"),
        (repository_lookups, "profiling.results", "write(f'docs/{1}.md', '')"),
        (incomplete_operations, "ops.fuse", "operator = BackendOperator('fuse', '', fake=None)"),
        (incomplete_operations, "ops.expand", "BackendOperator('shrink', '', fake=None)"),
    ],
)
def test_a_rule_that_is_broken_is_seen(rule, module, line):
    module = f"{PACKAGE}.{module}"
    before = rule(SOURCES)
    assert rule({**SOURCES, module: f"{SOURCES.get(module, '')}\n{line}\n"}) != before
