"""`make docs`: writes docs/api.md, docs/settings.md and, into out/docs, the reference as HTML."""

import importlib
import inspect
from pathlib import Path

from lorasb_kernels.cli.train import describe
from lorasb_kernels.train.config import fields

MODULES = (
    "lorasb_kernels",
    "lorasb_kernels.functional",
    "lorasb_kernels.init",
    "lorasb_kernels.optim",
    "lorasb_kernels.nn",
    "lorasb_kernels.integrations.peft",
)
HEAD = """# API

The public names with the first words of their docstrings; `make docs` writes this page. It also
builds the whole reference from the docstrings (arguments, shapes, errors, sources) into `out/docs`.
"""


def public(module: str) -> dict:
    """The classes and functions in a module's `__all__` by name."""
    loaded = importlib.import_module(module)
    objects = {name: getattr(loaded, name) for name in loaded.__all__}
    return {name: value for name, value in objects.items() if callable(value)}


def first_words(value) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.getdoc(value).split("\n\n")[0].split())


def page() -> str:
    """docs/api.md."""
    parts = [HEAD]
    for module in MODULES:
        rows = [f"| `{name}` | {first_words(value)} |" for name, value in public(module).items()]
        parts.append(
            "\n".join([f"## `{module}`", "", "| name | what it is |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)


SETTINGS_HEAD = """# Settings

Every field of `TrainConfig` is a key of the settings file and a flag of `lorasb train`
(`--learning-rate` for `learning_rate`); `lorasb config --preset NAME` writes a commented file.
`make docs` writes this page.
"""


def settings_page() -> str:
    """docs/settings.md."""
    sections: dict[str, list[str]] = {}
    for name, field in fields().items():
        rows = sections.setdefault(field.metadata["section"], [])
        rows.append(f"| `{name}` | {describe(field).replace('|', chr(92) + '|')} |")
    parts = [SETTINGS_HEAD]
    for section, rows in sections.items():
        parts.append(
            "\n".join([f"## {section}", "", "| setting | what it is |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def build_reference(folder: Path) -> None:
    """One HTML page per module."""
    import pdoc

    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8")
    build_reference(Path("out/docs"))
