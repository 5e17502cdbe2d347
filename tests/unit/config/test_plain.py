"""Values as people read them."""

import pytest

from megatrain.config.plain import plain


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        (True, "true"),
        (0, "0"),
        (1e-05, "1e-05"),
        ("a, b", "a, b"),
        ("", "''"),
        ({}, "{}"),
        ([], "[]"),
        ([1, None, ["x"]], "[1, null, [x]]"),
        ({"web": 0.7, "code": 0.3}, "web 0.7, code 0.3"),
        (list(range(10)), "[0, 1, 2, 3, 4, 5, 6, 7, ... 10 in all]"),
    ],
)
def test_a_value_is_written_without_pythons_spelling(value, text):
    assert plain(value) == text


def test_floats_get_as_many_digits_as_asked_for():
    assert plain([0.123456, {"a": 2.0}], 4) == "[0.1235, a 2]"
