"""`docs/benchmarks.md` and README.md's plot from the results database.

    python -m bench.report                                    # the database, bench/results
    python -m bench.report --results the-file-that-was-sent.json   # the database, and this file

Shows the newest results of each GPU, and nothing that is not in the database; results whose smoke
tests failed are left out, and said to be.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.headline import headline_table, smoke_tests_failed
from bench.host import tables
from bench.plots import draw_plots
from bench.recording import folder_name
from lorasb_kernels.profiling.results import Results, Row, read, read_all
from lorasb_kernels.utils.files import write_text
from lorasb_kernels.utils.tables import markdown_table, seconds, size

HEAD = """# Benchmarks

Written by `python -m bench.report` from the results database, `bench/results/`. `make gpu` measures
on one GPU in at most nine minutes and adds to the database; [the A6000 guide](a6000.md) says how to
run it.

Times are medians of interleaved bursts over operands larger than the L2 cache, forward and
backward with the input gradient where it says "both". Overhead is the time over that of the
frozen layer in the same run. `python -m bench.changes` compares two sets of results.
"""
HOST = """## What an adapter costs the host

`python -m bench.host`, one core, {date}, commit {commit}, torch {torch}. Two x86 cores that other
programs used as well, heavily: only the relations within a table mean something. Medians of
interleaved bursts, processor time of the process; in brackets the multiple of the first line, the
median over rounds. LoRA-SB trains R, peft and "LoRA" train A and B, "published" is the form of
LoRA-SB's published code, "addmm" an autograd function around in-place `addmm_`. A part that is not
in a table was not measured.

{tables}
"""
DATABASE = "bench/results"
BEGIN, END = "<!-- measured, by python -m bench.report -->", "<!-- /measured -->"
NO_NUMBER = (
    "**No GPU number exists yet.** "
    "Every result here was measured on a CPU or is marked as a prediction."
)
NOTHING = """
**Not measured.** There are no results of a GPU in the database yet, so there is no number to
show. `lorasb profile --gpu a6000` prints what the roofline predicts.
"""


def render(results: Sequence[Results], docs: str | Path, host: dict | None = None) -> list[Path]:
    """Writes `benchmarks.md` and the plots into `docs`; returns the files.

    Args:
        results: all results, oldest first.
        docs: folder.
        host: what `bench.host` measured, the content of its host.json.
    """
    docs = Path(docs)
    newest = _newest(results)
    parts, files = [HEAD], []
    red = [found.environment for found in results if smoke_tests_failed(found)]
    parts += [f"Left out, as a smoke test failed: {where.gpu}, {where.date}." for where in red]
    if not any(not gpu.startswith("cpu") for gpu in newest):
        parts.append(NOTHING)
    if host is not None:
        parts.append(HOST.format(tables=tables(host), **host["environment"]))
    for found in newest.values():
        plots = draw_plots(found, docs / "images")
        files += plots
        parts.append(_device(found, [path.relative_to(docs) for path in plots]))
    page = docs / "benchmarks.md"
    write_text(page, "\n".join(part.strip("\n") + "\n" for part in parts))
    return [page, *files]


def _newest(results: Sequence[Results]) -> dict[str, Results]:
    """The newest valid results by GPU; `results` are oldest first."""
    return {found.environment.gpu: found for found in results if not smoke_tests_failed(found)}


def measured_in_readme(results: Sequence[Results], docs: str) -> str:
    """What README.md says of speed on GPUs: a plot and a table for each, or that there is none.

    Args:
        results: all results, oldest first.
        docs: the folder of the documentation, relative to README.md.
    """
    shown = []
    for gpu, found in _newest(results).items():
        table = headline_table(found)
        if table and not gpu.startswith("cpu"):
            name = f"{folder_name(gpu)}-headline"
            where = f"{gpu}, {found.environment.date[:10]}, one block of Mistral-7B in bf16."
            image = f"![time over the frozen block]({docs}/images/{name}.png)"
            shown.append(f"{where}\n\n{image}\n\n{table}")
    return "\n\n".join(shown) or NO_NUMBER


def with_measured(readme: str, measured: str) -> str:
    """README.md's text with what it says of speed on GPUs replaced.

    Raises:
        ValueError: the marks around it are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{measured}\n{END}{after}"


def _device(found: Results, plots: Sequence[Path]) -> str:
    where = found.environment
    driver = f"driver {where.driver}, " if where.driver else ""
    triton = f"Triton {where.triton}, " if where.triton else ""
    lines = [
        f"## {where.gpu}",
        f"{where.date}, commit {where.commit}, {driver}torch {where.torch}, {triton}"
        f"{_ceilings(found)}",
    ]
    if where.gpu.startswith("cpu"):
        lines.append("A CPU: this says nothing of a GPU.")
    lines += [f"![{path.stem}]({path.as_posix()})" for path in plots]
    for title, section in SECTIONS:
        table = section(found)
        if table:
            lines += [f"### {title}", table]
    return "\n\n".join(lines)


def _ceilings(found: Results) -> str:
    rows = found.select(op="ceiling")
    words = [f"{row.value:.4g} {row.unit} ({row.dtype})" for row in rows]
    return "measured ceilings " + ", ".join(words) if words else "no ceilings measured"


def _medians(found: Results, prefix: str) -> dict[tuple, dict[str, Row]]:
    """Median times by case, then contender, of the operations that start so."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in found.select(quantity="time", quantile="p50"):
        if row.op.startswith(prefix):
            cases.setdefault(row.case, {})[row.contender] = row
    return cases


def _contenders(cases: dict[tuple, dict[str, Row]]) -> list[str]:
    return list(dict.fromkeys(name for timed in cases.values() for name in timed))


def overhead_table(prefix: str) -> Callable[[Results], str]:
    """Time of the frozen layer, and every contender's as a multiple of it."""

    def table(found: Results) -> str:
        cases = {c: timed for c, timed in _medians(found, prefix).items() if "frozen" in timed}
        if not cases:
            return ""
        names = [name for name in _contenders(cases) if name != "frozen"]
        rows = []
        for (op, shape, tokens, r, _), timed in cases.items():
            bound = timed["frozen"].value
            ratios = [f"{timed[n].value / bound:.2f}" if n in timed else "" for n in names]
            rows.append((f"{shape} {op.partition('.')[2]}", str(tokens), str(r)))
            rows[-1] += (seconds(1e-6 * bound), *ratios)
        return markdown_table(("case", "M", "r", "frozen", *names), rows)

    return table


def kernel_table(found: Results) -> str:
    """Time, achieved rates and share of the roofline of each implementation."""
    rows = []
    for case, timed in _medians(found, "kernel.").items():
        op, shape, tokens, r, _ = case
        for name, row in timed.items():
            value = found.beside(row)
            cells = (f"{op[7:]} {shape}", str(tokens), str(r), name, seconds(1e-6 * row.value))
            cells += (f"{value['bandwidth']:.0f}", f"{value['rate']:.1f}")
            share = value.get("roofline_share")
            rows.append((*cells, "" if share is None else f"{share:.0%}"))
    header = ("kernel", "M", "r", "implementation", "time", "GB/s", "TFLOP/s", "of roofline")
    return markdown_table(header, rows) if rows else ""


def memory_table(found: Results) -> str:
    """What forward keeps for backward, and the peak of both."""
    rows = []
    for row in found.select(quantity="saved_memory"):
        peak = found.beside(row).get("peak_memory")
        cells = (row.shape, str(row.tokens), str(row.r), row.contender, size(row.value))
        rows.append((*cells, "" if peak is None else size(peak)))
    header = ("case", "M", "r", "contender", "kept for backward", "peak")
    return markdown_table(header, rows) if rows else ""


def train_table(found: Results) -> str:
    """Tokens per second and peak memory of a training step."""
    rows = []
    for case, timed in _medians(found, "train.").items():
        _, shape, _, r, _ = case
        for name, row in timed.items():
            value = found.beside(row)
            peak = size(value["peak_memory"]) if "peak_memory" in value else ""
            cells = (f"{shape}, {value['blocks']:.0f} blocks", str(r), name)
            rows.append((*cells, seconds(1e-6 * row.value), f"{value['throughput']:.0f}", peak))
    header = ("model", "r", "method", "step", "tokens/s", "peak beyond weights")
    return markdown_table(header, rows) if rows else ""


def init_table(found: Results) -> str:
    """Time, captured energy and peak memory of initialization."""
    rows = []
    for case, timed in _medians(found, "init.").items():
        op, shape, _, r, _ = case
        for name, row in timed.items():
            value = found.beside(row)
            energy = value.get("captured_energy")
            peak = size(value["peak_memory"]) if "peak_memory" in value else ""
            cells = (f"{op[5:]}: {shape}", str(r), name, seconds(1e-6 * row.value))
            rows.append((*cells, "" if energy is None else f"{energy:.6f}", peak))
    header = ("case", "r", "who", "time", "captured energy", "peak")
    return markdown_table(header, rows) if rows else ""


def experts_table(found: Results) -> str:
    """Time of frozen experts, forward and backward."""
    rows = [
        (shape, str(tokens), name, seconds(1e-6 * row.value))
        for (_, shape, tokens, *_), timed in _medians(found, "experts.").items()
        for name, row in timed.items()
    ]
    return markdown_table(("experts", "M", "who", "time"), rows) if rows else ""


def optimizer_table(found: Results) -> str:
    """Time of an optimizer step."""
    rows = [
        (shape, str(r), name, seconds(1e-6 * row.value))
        for (_, shape, _, r, _), timed in _medians(found, "optimizer.").items()
        for name, row in timed.items()
    ]
    header = ("parameters", "r", "optimizer", "clip, step and clear")
    return markdown_table(header, rows) if rows else ""


SECTIONS = (
    ("At a glance", headline_table),
    ("One layer, over the frozen one", overhead_table("linear.")),
    ("A whole block, over the frozen one", overhead_table("block.")),
    ("Kernels", kernel_table),
    ("Experts of a mixture, frozen", experts_table),
    ("Memory of one layer or block", memory_table),
    ("A training step", train_table),
    ("An optimizer step", optimizer_table),
    ("Initialization", init_table),
)


def _with_database(path: Path) -> tuple[list[Results], dict | None]:
    """The results to show, oldest first, and what `bench.host` measured.

    Args:
        path: a database; or a results file, which is shown with what is in `DATABASE`.
    """
    database, found = path, read_all(path)
    if path.is_file():
        database = Path(DATABASE)
        found = list(dict.fromkeys([*read_all(database), *found]))
        found.sort(key=lambda results: results.environment.date)
    host = database / "host.json"
    return found, json.loads(host.read_text()) if host.exists() else None


def _say_if_not_shown(sent: Path, results: Sequence[Results]) -> None:
    own = read(sent)
    shown = _newest(results).get(own.environment.gpu)
    if own != shown:
        why = "a smoke test failed"
        if shown is not None and not smoke_tests_failed(own):
            why = f"those of {shown.environment.date} are newer"
        print(f"{sent} is not shown: {own.environment.gpu}, {own.environment.date}; {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and its plots, and prints their names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--results",
        type=Path,
        default=DATABASE,
        help=f"a database, default {DATABASE}; or a file, which is shown with that one",
    )
    parser.add_argument("--docs", default="docs", help="folder to write into, default docs")
    parser.add_argument("--readme", default="README.md", help="default README.md")
    options = parser.parse_args(arguments)
    try:
        results, host = _with_database(options.results)
        readme = Path(options.readme)
        measured = measured_in_readme(results, options.docs)
        text = with_measured(readme.read_text(encoding="utf-8"), measured)
        for path in render(results, options.docs, host):
            print(path)
        write_text(readme, text)
        print(readme)
        if options.results.is_file():
            _say_if_not_shown(options.results, results)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


__all__ = ["main", "measured_in_readme", "render", "with_measured"]

if __name__ == "__main__":
    main()
