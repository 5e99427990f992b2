"""The results database, comparing two sets of results, and rendering them."""

import dataclasses
import json
from pathlib import Path

import pytest

from bench import changes as changes_tool
from bench import headline as headline_tool
from bench import report as report_tool
from bench.changes import changes, changes_table
from bench.recording import write
from bench.report import render
from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.profiling.costs import WAYS
from lorasb_kernels.profiling.prediction import prediction_errors
from lorasb_kernels.profiling.results import Environment, Row, read, read_all
from lorasb_kernels.profiling.roofline import datasheet_ceilings
from lorasb_kernels.profiling.shapes import PRESETS

ROOT = Path(__file__).resolve().parents[2]
WHERE = Environment(
    gpu="NVIDIA RTX A6000",
    driver="1.2",
    torch="2.13.0",
    triton="3.8.0",
    commit="abc",
    date="2026-01-02T03:04Z",
)


def timing(value, contender="lorasb triton", op="linear.both", spread=0.02, **fields):
    base = Row(
        op, "mistral-7b/q_proj 4096x4096", 8192, 96, "bfloat16", contender, "time", "p50", 0.0, "us"
    )
    base = dataclasses.replace(base, **fields)
    values = {"p10": value * (1 - spread / 2), "p50": value, "p90": value * (1 + spread / 2)}
    return [dataclasses.replace(base, quantile=q, value=v) for q, v in values.items()]


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, WHERE, timing(10.0))
    assert path == tmp_path / "nvidia-rtx-a6000" / "2026-01-02-abc.json"
    found = read(path)
    assert found.environment == WHERE
    assert found.rows == tuple(timing(10.0))
    assert [results.rows for results in read_all(tmp_path)] == [found.rows]


def test_a_repeated_part_replaces_its_rows_alone(tmp_path):
    write(tmp_path, WHERE, timing(10.0) + timing(5.0, "frozen"))
    path = write(tmp_path, WHERE, timing(20.0))
    assert read(path).rows == tuple(timing(20.0) + timing(5.0, "frozen"))
    assert list(path.parent.iterdir()) == [path]


def test_a_number_that_is_none_is_not_written(tmp_path):
    path = write(tmp_path, WHERE, timing(10.0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, WHERE, timing(float("nan")))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format=2), "format is 2; expected 1"),
        (lambda record: record["columns"].pop(), "columns are"),
        (lambda record: record["environment"].pop("gpu"), "gpu"),
        (lambda record: record["rows"].append([1]), "not a results file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    path = write(tmp_path, WHERE, timing(10.0))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        read_all(tmp_path)
    assert str(path) in str(raised.value)


def results(tmp_path, name, value, **fields):
    write(tmp_path / name, WHERE, timing(value, **fields) + timing(5.0, "frozen"))
    return read_all(tmp_path / name)


def test_a_change_beyond_noise_is_seen(tmp_path):
    found = changes(results(tmp_path, "a", 10.0), results(tmp_path, "b", 12.0))
    assert [(c.verdict, round(c.relative, 3)) for c in found] == [("slower", 0.2), ("", 0.0)]
    assert "slower" in changes_table(found)
    assert "1 of 2 timings did not change" in changes_table(found)
    faster = changes(results(tmp_path, "c", 10.0), results(tmp_path, "d", 8.0))
    assert faster[0].verdict == "faster"


def test_a_change_within_noise_is_not(tmp_path):
    noisy = changes(results(tmp_path, "a", 10.0, spread=0.5), results(tmp_path, "b", 12.0))
    assert not any(change.verdict for change in noisy)


def test_the_spread_of_repeated_runs_is_noise(tmp_path):
    before = [*results(tmp_path, "a", 9.0), *results(tmp_path, "b", 11.0)]
    found = changes(before, results(tmp_path, "c", 11.5))
    assert not any(change.verdict for change in found)


def test_different_gpus_are_not_compared(tmp_path):
    write(tmp_path / "b", dataclasses.replace(WHERE, gpu="NVIDIA L40S"), timing(1.0))
    with pytest.raises(ValueError, match="expected those of one GPU"):
        changes(results(tmp_path, "a", 1.0), read_all(tmp_path / "b"))


def everything():
    """Rows of every kind that the report shows."""
    rows = []
    for tokens in (512, 8192):
        for op, shape in (
            ("block.both", "mistral-7b/block"),
            ("linear.both", "mistral-7b/q_proj 4096x4096"),
        ):
            at = {"op": op, "shape": shape, "tokens": tokens}
            rows += timing(100.0, "frozen", **at) + timing(123.0, "lorasb triton", **at)
            rows.append(
                dataclasses.replace(
                    rows[-1], quantity="saved_memory", quantile="", value=2.5e6, unit="bytes"
                )
            )
    kernel = timing(10.0, "triton", "kernel.shrink", shape="4096x4096")
    rows += kernel
    for quantity, value, unit in (
        *(("bandwidth", 700.0, "GB/s"), ("rate", 66.0, "TFLOP/s"), ("roofline_share", 0.91, "1")),
        *(("bytes", 7e6, "bytes"), ("flops", 6.6e8, "flops")),
    ):
        rows.append(dataclasses.replace(kernel[1], quantity=quantity, value=value, unit=unit))
    for quantity, value, unit in (("bandwidth", 720.0, "GB/s"), ("rate", 130.0, "TFLOP/s")):
        rows.append(Row("ceiling", "", 0, 0, "bfloat16", "torch", quantity, "p50", value, unit))
    step = timing(2e5, "lorasb auto", "train.step", shape="mistral-7b 8x512")
    rows += step
    for quantity, value in (("throughput", 20480.0), ("blocks", 32), ("peak_memory", 3e9)):
        rows.append(dataclasses.replace(step[1], quantity=quantity, quantile="", value=value))
    rows += timing(77.0, "packed, AdamW", "optimizer.step", shape="224 cores")
    rows += timing(3e6, "layerwise", "init.model", shape="mistral-7b 4 blocks")
    return rows


def test_the_report_shows_what_was_measured(tmp_path):
    write(tmp_path / "db", WHERE, everything())
    page, *plots = render(read_all(tmp_path / "db"), tmp_path / "docs")
    text = page.read_text()
    assert "NVIDIA RTX A6000" in text
    assert "commit abc" in text
    assert "Not measured" not in text
    for number in ("1.23", "2.5 MB", "91%", "20480", "77 µs", "3 GB", "720 GB/s"):
        assert number in text, number
    names = {plot.stem.removeprefix("nvidia-rtx-a6000-") for plot in plots}
    assert names == {"headline", "overhead", "shapes", "roofline", "memory", "init"}
    for plot in plots:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"images/{plot.name}" in text


def test_without_results_the_report_says_so(tmp_path):
    page, *plots = render([], tmp_path)
    assert "**Not measured.**" in page.read_text()
    assert not plots


def test_the_page_in_docs_is_the_database_rendered(tmp_path):
    database = ROOT / "bench" / "results"
    report_tool.main(["--results", str(database), "--docs", str(tmp_path)])
    page = tmp_path / "benchmarks.md"
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page.read_text()


def test_the_readme_says_what_the_database_says():
    readme = (ROOT / "README.md").read_text()
    measured = report_tool.measured_in_readme(read_all(ROOT / "bench" / "results"), "docs")
    assert report_tool.with_measured(readme, measured) == readme


def headline_rows(frozen=100.0, ours=107.0):
    rows = []
    for op, tokens in (("block.graph", 512), ("block.both", 8192)):
        at = {"op": op, "shape": "mistral-7b/block", "tokens": tokens}
        rows += timing(frozen, "frozen", **at) + timing(ours, "lorasb triton", **at)
    return rows


def test_the_file_that_was_sent_becomes_the_readmes_plot(tmp_path, monkeypatch):
    sent = write(tmp_path / "db", WHERE, headline_rows())
    monkeypatch.chdir(ROOT)  # whose database is shown too
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{report_tool.BEGIN}\nold\n{report_tool.END}\nB\n")
    docs = tmp_path / "docs"
    report_tool.main(["--results", str(sent), "--docs", str(docs), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("# A\n")
    assert text.endswith(f"{report_tool.END}\nB\n")
    assert "old" not in text
    assert "1.07× (107 µs)" in text
    assert f"({docs}/images/nvidia-rtx-a6000-headline.png)" in text
    assert (docs / "images" / "nvidia-rtx-a6000-headline.png").exists()


@pytest.fixture
def database(tmp_path, monkeypatch):
    """A checkout whose database has results of another GPU, and of the host."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"{report_tool.BEGIN}\n{report_tool.END}\n")
    database = Path("bench/results")
    write(database, dataclasses.replace(WHERE, gpu="NVIDIA L40S"), headline_rows(ours=119.0))
    host = (ROOT / "bench" / "results" / "host.json").read_text()
    (database / "host.json").write_text(host)
    return database


def test_a_file_that_was_sent_is_shown_beside_what_the_database_has(database):
    sent = write("sent", WHERE, headline_rows())
    report_tool.main(["--results", str(sent)])
    page, readme = Path("docs/benchmarks.md").read_text(), Path("README.md").read_text()
    for text in (page, readme):
        assert "1.07× (107 µs)" in text
        assert "1.19× (119 µs)" in text
    assert "## What an adapter costs the host" in page


def test_a_file_that_is_not_shown_is_named(database, capsys):
    write(database, dataclasses.replace(WHERE, date="2026-02-01T00:00Z"), headline_rows())
    sent = write("sent", WHERE, headline_rows(ours=131.0))
    report_tool.main(["--results", str(sent)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"{sent} is not shown: NVIDIA RTX A6000, 2026-01-02T03:04Z; "
        "those of 2026-02-01T00:00Z are newer"
    )
    red = Row("tests", "", 0, 0, "", "smoke", "passed", "", 0.0, "1")
    write("sent", WHERE, [red])
    report_tool.main(["--results", str(sent)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("a smoke test failed")


def test_numbers_of_a_cpu_or_of_red_tests_are_not_shown(tmp_path):
    write(tmp_path, dataclasses.replace(WHERE, gpu="cpu: some"), headline_rows())
    assert report_tool.measured_in_readme(read_all(tmp_path), "docs") == report_tool.NO_NUMBER
    red = Row("tests", "", 0, 0, "", "smoke", "passed", "", 0.0, "1")
    write(tmp_path, WHERE, [*headline_rows(), red])
    assert report_tool.measured_in_readme(read_all(tmp_path), "docs") == report_tool.NO_NUMBER
    page = render(read_all(tmp_path), tmp_path / "docs")[0].read_text()
    assert "Left out, as a smoke test failed: NVIDIA RTX A6000" in page
    assert "**Not measured.**" in page


def test_the_table_at_the_end_of_a_run(tmp_path, capsys):
    path = write(tmp_path, WHERE, headline_rows())
    headline_tool.main([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "NVIDIA RTX A6000, Mistral-7B, one block, bf16; less is better"
    assert [cell.strip() for cell in printed[-2].split("|")][1:-1] == [
        "LoRA-SB by this library",
        "1.07× (107 µs)",
        "1.07× (107 µs)",
    ]
    assert printed[-1] == f"Send this file: {path}"
    assert "The smoke tests have not run to their end." in printed
    red = Row("tests", "", 0, 0, "", "smoke", "passed", "", 0.0, "1")
    write(tmp_path, WHERE, [red])
    headline_tool.main([str(tmp_path)])
    assert "NOT VALID: a smoke test failed" in capsys.readouterr().out


def test_the_error_of_the_prediction_is_that_of_the_measurements(tmp_path):
    (layer,) = (layer for layer in PRESETS["mistral-7b"].layers if layer.name == "q_proj")
    launches = WAYS["frozen"](8192, layer.n, layer.m, 96, 2).of("both")
    floor = datasheet_ceilings(GPUS["a6000"], "bfloat16").floor(launches)
    write(tmp_path, WHERE, timing(2e6 * floor, "frozen"))
    assert "| a6000 |" in prediction_errors(read_all(tmp_path))
    assert "2.00" in prediction_errors(read_all(tmp_path))
    assert "no GPU has measurements" in prediction_errors([])


def test_commands(tmp_path, capsys):
    write(tmp_path / "a", WHERE, timing(10.0))
    write(tmp_path / "b", WHERE, timing(12.0))
    changes_tool.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "+20.0%" in capsys.readouterr().out
    docs = str(tmp_path / "docs")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report_tool.BEGIN}\n{report_tool.END}\n")
    report_tool.main(["--results", str(tmp_path / "a"), "--docs", docs, "--readme", str(readme)])
    assert (tmp_path / "docs" / "benchmarks.md").exists()
    with pytest.raises(SystemExit, match="neither a results file nor a folder"):
        changes_tool.main([str(tmp_path / "a"), str(tmp_path / "none")])
