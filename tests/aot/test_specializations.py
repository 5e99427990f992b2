"""A new number of rows compiles nothing anew: a compilation takes 0.3 to 1 second."""

from tests.aot.process import run_compiling


def test_a_kernel_is_compiled_once_for_all_numbers_of_rows():
    found = dict(line.split() for line in run_compiling("tests.aot.specializations").splitlines())
    assert len(found) == 8
    assert set(found.values()) == {"1"}, found
