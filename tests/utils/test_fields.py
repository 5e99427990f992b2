"""The types of settings, checked against the annotations of their dataclass."""

from dataclasses import dataclass

import pytest

from lorasb_kernels.utils.fields import check_fields


@dataclass
class Settings:
    count: int = 1
    rate: float | None = 0.5
    flag: bool = False
    names: str | tuple[str, ...] = "all"


@pytest.mark.parametrize(
    "fields", [{}, {"rate": 1}, {"rate": None}, {"flag": True}, {"names": ("a", "é")}]
)
def test_values_of_the_annotated_types_pass(fields):
    check_fields(Settings(**fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"count": 1.0}, TypeError, "count is 1.0; expected int"),
        ({"count": True}, TypeError, "count is True; expected int"),
        ({"count": None}, TypeError, "count is None; expected int"),
        ({"count": 2**63}, ValueError, "count has more than 64 bits"),
        ({"rate": 10**5000}, ValueError, "rate has more than 64 bits"),
        ({"rate": "0.5"}, TypeError, "rate is '0.5'; expected float or None"),
        ({"rate": True}, TypeError, "rate is True; expected float or None"),
        ({"flag": 1}, TypeError, "flag is 1; expected bool"),
        ({"names": ["a"]}, TypeError, r"names is \['a'\]; expected str or tuple"),
        ({"names": ("a", 1)}, TypeError, r"names is \('a', 1\); expected strings in it"),
        ({"names": "a\0b"}, ValueError, "names is .*; expected text that can be written"),
        ({"names": ("\ud800",)}, ValueError, "names is .*; expected text that can be written"),
        ({"names": (10**5000,)}, TypeError, r"names is \(<16610 bits>,\); expected strings"),
    ],
)
def test_other_values_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        check_fields(Settings(**fields))
