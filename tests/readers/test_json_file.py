"""JSON that anybody may have written is read or refused with a reason; the sentences are in test_json_reporter.py."""

from __future__ import annotations

import math

import pytest

from f3rm_verify.readers.json_file import MAX_DEPTH, parse_json


def test_plain_data_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', finite=True) == {"a": [1, 2.5, None, True, "é"]}


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": {"b": -Infinity}}', "[1e999]"])
def test_numbers_that_json_lacks(text: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        parse_json(text, finite=True)
    parse_json(text, finite=False)
    assert math.isnan(parse_json("NaN", finite=False))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"verdict": 1, "verdict": 2}', "a key twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
        ("{", "Expecting"),
        (b"\xff", "decode"),
    ],
)
def test_what_is_refused(text: str, reason: str, finite: bool) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text, finite=finite)


def test_as_deep_as_allowed() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, finite=True) is not None
