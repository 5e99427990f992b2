"""Look at benchmark results: render them, or compare two sets.

    lorasb bench report --results bench/results --docs docs
    lorasb bench compare before.json after.json

Measuring is `make gpu`, or `pytest bench/...` for a selection.
"""

import argparse

from lorasb_kernels.train.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which results."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="report|compare")
    report = actions.add_parser("report", help="write tables and plots")
    report.add_argument("--results", default="bench/results", help="default bench/results")
    report.add_argument("--docs", default="docs", help="folder to write into, default docs")
    compare = actions.add_parser("compare", help="show what got faster or slower")
    compare.add_argument("before", help="results file, or a folder of runs of the same code")
    compare.add_argument("after", help="likewise")
    compare.add_argument("--all", action="store_true", help="show changes within noise too")


def run(options: argparse.Namespace) -> int:
    """Renders or compares."""
    from lorasb_kernels.profiling.changes import changes, changes_table
    from lorasb_kernels.profiling.results import read_all

    try:
        if options.action == "report":
            from lorasb_kernels.profiling.report import render

            for path in render(read_all(options.results), options.docs):
                print(path)
        else:
            found = changes(read_all(options.before), read_all(options.after))
            print(changes_table(found, options.all))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    return 0
