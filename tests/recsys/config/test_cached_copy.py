"""Equal settings are parsed once, and nothing but equal ones share a result."""

from __future__ import annotations

from typing import Any

import pytest

from recsys.config.plain_yaml import NUM_RESULTS, cached_copy


def test_equal_settings_are_parsed_once_and_returned_as_copies() -> None:
    calls = []

    @cached_copy
    def parse(content: dict[str, Any]) -> dict[str, Any]:
        calls.append(content)
        return {"parsed": [content["a"]]}

    first = parse({"a": 3})
    first["parsed"].append(4)
    assert parse({"a": 3}) == {"parsed": [3]}
    assert len(calls) == 1
    for number in range(NUM_RESULTS):
        parse({"a": 10 + number})
    assert parse({"a": 3}) == {"parsed": [3]}
    assert len(calls) == NUM_RESULTS + 2  # the oldest result had been dropped


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (1, "1"), (None, "None")])
def test_values_and_keys_of_other_types_are_parsed_by_themselves(one: Any, other: Any) -> None:
    parse = cached_copy(
        lambda content: [(type(key), type(value)) for key, value in content.items()]
    )
    for key in ("a", one):
        assert parse({key: one}) == [(type(key), type(one))]
        assert parse({key: other}) == [(type(key), type(other))]
    assert parse({other: one}) == [(type(other), type(one))]
