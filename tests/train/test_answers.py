r"""What written answers say, and when two of them in LaTeX mean the same."""

from fractions import Fraction

import pytest

from lorasb_kernels.train.answers import chosen, final_latex, final_number, until
from lorasb_kernels.train.latex import equivalent, last_boxed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("#### 1,200", 1200),
        ("#### 7 of 9", 7),
        ("first 3, then 12.50 dollars.", Fraction(25, 2)),
        ("it is -4", -4),
        ("the answer is 3/4", Fraction(3, 4)),
        ("#### none", None),
        ("no number", None),
        ("1/0", None),
        ("so 42.", 42),
        ("it costs $.50", Fraction(1, 2)),
        ("#### 5\n#### 6", 6),
        ("#### 5\nThe answer is: 6. Check: 5 + 1 = 7", 6),
        ("The answer is: 4\nThe answer is: $5", 5),
        ("The answer is: none, though 3", 3),
        ("The answer is: unknown", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{\text{a {b} c}}.", r"\text{a {b} c}"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{open", None),
        ("The answer is: 12.\nMore", "12"),
        (r"\boxed{1}. The answer is: $\frac12$.", r"$\frac12$"),
        (r"The answer is: $\boxed{7}$", "7"),
        ("nothing", None),
        ("The answer is:", None),
    ],
)
def test_final_latex(text, answer):
    assert final_latex(text) == answer


def test_the_last_box_is_the_last_one():
    assert last_boxed(r"\boxed{1}\fbox{2}") == "2"
    assert last_boxed(r"\fbox{2}\boxed{1}") == "1"


SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\tfrac12"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac12"),
    (".25", r"\frac{1}{4}"),
    ("-0.5", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"1\frac{4}{5}", r"\frac95"),
    ("1,000", "1000"),
    ("10{,}000", "10000"),
    ("3.0", "3"),
    ("x = 5", "5"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt{ 3 }", r"2\sqrt3"),
    (r"\sqrt[3]2", r"\sqrt[3]{2}"),
    (r"\left( 1, \frac12 \right)", "(1,0.5)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\$5", "5"),
    (r"50\%", "50"),
    (r"5\text{ cm}", "5"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{east}", r"\mathrm{east}"),
    (r"1 \! 000", "1000"),
    ("7.", "7"),
    (r"\frac\pi2", r"\frac\pi2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("2, 3", "2,3"),
    ("[1, 2)", "[1,2)"),
]
DIFFERENT = [
    ("2", r"\frac12"),
    ("1", r"\frac12"),
    ("3", r"\frac53"),
    ("0.33", r"\frac13"),
    ("5", "50"),
    ("0.5", r"50\%"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("x+1", "x-1"),
    ("-3", "3"),
    (r"\sqrt{2}", "2"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    ("", "0"),
    ("1,000", "(1,0)"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_equivalent_answers(first, second):
    assert equivalent(first, second)
    assert equivalent(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_answers(first, second):
    assert not equivalent(first, second)
    assert not equivalent(second, first)


def test_a_text_ends_at_the_first_stop():
    assert until("7\n### Instruction: 8 ### Response: 9", ("Response", "### Instruction")) == "7\n"
    assert until("7", ("Instruction",)) == "7"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the correct answer is Answer2, not answer1", "answer2"),
        ("TRUE", None),
        ("answer", None),
        ("answer11", "answer11"),
    ],
)
def test_the_first_choice_named(text, choice):
    assert chosen(text, ("answer1", "answer2", "answer11")) == choice
    assert chosen(text, ()) is None
