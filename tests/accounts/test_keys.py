"""Keys in memory, and the fields that people set."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest

from trio_cluster.accounts.fields import read_changes, read_grace, read_new, read_time, show_key
from trio_cluster.accounts.keys import KeyDigest, KeyRecord, KeyTable, digest_of, new_key
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.errors import ApiError, InvalidRequest


def table_of(*keys: tuple[KeyRecord, bytes, float | None]) -> KeyTable:
    table = KeyTable()
    table.replace(
        [(record, [KeyDigest(digest_of(key), until)]) for record, key, until in keys], required=True
    )
    return table


def test_a_key_is_random_and_needs_no_quotes() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(re.fullmatch(r"tc-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_a_key_is_found_by_its_whole_text_only() -> None:
    table = table_of((KeyRecord(name="a"), b"tc-key", None))
    entry = table.find(b"tc-key")
    assert entry is not None
    assert (entry.principal.name, entry.expires_at, entry.disabled) == ("a", math.inf, False)
    for other in (b"", b"tc-ke", b"tc-key ", b"TC-KEY", digest_of(b"tc-key").encode()):
        assert table.find(other) is None
    assert "tc-key" not in repr(entry)


def test_the_earlier_end_counts() -> None:
    for ends in ((5.0, 9.0), (9.0, 5.0), (5.0, None), (None, 5.0)):
        entry = table_of((KeyRecord(name="a", expires_at=ends[0]), b"k", ends[1])).find(b"k")
        assert entry is not None
        assert entry.expires_at == 5.0


def test_there_is_an_admin_while_an_admin_key_is_valid() -> None:
    now = time.time()
    assert not KeyTable().has_admin
    assert not table_of((KeyRecord(name="a", role="operator"), b"k", None)).has_admin
    assert table_of((KeyRecord(name="a", role="admin"), b"k", None)).has_admin
    assert table_of((KeyRecord(name="a", role="admin", expires_at=now + 50), b"k", None)).has_admin
    assert not table_of((KeyRecord(name="a", role="admin", expires_at=now - 1), b"k", None)).has_admin
    assert not table_of((KeyRecord(name="a", role="admin", disabled=True), b"k", None)).has_admin


def test_the_principal_has_what_the_key_may_do_and_limits_only_if_there_are_any() -> None:
    plain = KeyRecord(name="a", budget_per="week")
    assert plain.principal() == Principal("a", "inference")
    record = KeyRecord(name="a", role="admin", models=("m",), budget_tokens=5, budget_per="day", weight=2.0)
    limits = Limits(budget_tokens=5, budget_per="day")
    assert record.principal() == Principal("a", "admin", ("m",), limits, 2.0)


WHOLE: dict[str, Any] = {
    "name": "a.b-c_d@e+f",
    "models": ["qwen*", "b"],
    "role": "operator",
    "requests_per_minute": 1,
    "tokens_per_minute": 2,
    "max_concurrency": 3,
    "budget": {"tokens": 4, "per": "day"},
    "priority": "high",
    "weight": 0.5,
    "expires_at": "2026-12-31T18:00:00Z",
    "disabled": True,
}


def test_a_key_is_shown_as_it_was_set() -> None:
    record = read_new(WHOLE, 0.0)
    assert show_key(record) == WHOLE | {"created_at": "1970-01-01T00:00:00Z"}
    nothing = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "max_concurrency", "budget"))
    assert show_key(read_new({"name": "a"} | nothing, 0.0))["budget"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None),
        pytest.param("weight", 10**400, id="a long weight"),
        pytest.param("expires_at", 10**400, id="a late end"),
        ("name", ""),
        ("name", "a b"),
        ("name", "x" * 65),
        ("name", "-a"),
        ("name", "tc-0123456789"),
        ("name", "a/b"),
        ("name", 5),
        ("models", "m"),
        ("models", [""]),
        ("models", [5]),
        ("models", ["a\nb"]),
        ("models", ["m"] * 101),
        ("role", "root"),
        ("role", None),
        ("role", ["admin"]),
        ("requests_per_minute", -1),
        ("requests_per_minute", 0),
        ("requests_per_minute", 1.5),
        ("requests_per_minute", True),
        ("requests_per_minute", "5"),
        ("tokens_per_minute", 2**53),
        ("max_concurrency", []),
        ("budget", 5),
        ("budget", {"tokens": 5}),
        ("budget", {"tokens": 5, "per": "year"}),
        ("budget", {"tokens": None, "per": "day"}),
        ("budget", {"tokens": 0, "per": "day"}),
        ("budget", {"tokens": 5, "per": "day", "more": 1}),
        ("priority", "urgent"),
        ("weight", 0),
        ("weight", -1),
        ("weight", math.nan),
        ("weight", math.inf),
        ("weight", True),
        ("weight", "1"),
        ("weight", 1001),
        ("expires_at", "tomorrow"),
        ("expires_at", -1),
        ("expires_at", 1e300),
        ("expires_at", True),
        ("expires_at", "10000-01-01"),
        ("disabled", "no"),
        ("disabled", None),
        ("requests_per_min", 5),
        ("key", "tc-mine"),
        ("created_at", 5),
    ],
)
def test_what_is_not_valid_is_refused_with_the_name_of_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_new({"name": "a"} | {field: value}, 0.0)
    assert refused.value.status == 400
    assert (refused.value.param or "").partition(".")[0] == field
    assert field in refused.value.message


def test_a_name_is_required_cannot_be_changed_and_is_not_that_of_an_option() -> None:
    with pytest.raises(InvalidRequest, match="name"):
        read_new({}, 0.0)
    with pytest.raises(InvalidRequest, match="cannot be changed"):
        read_changes({"name": "b"})
    for name in ("default", "operator"):
        with pytest.raises(ApiError, match="taken by the option") as refused:
            read_new({"name": name}, 0.0)
        assert refused.value.status == 409


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00", 3600.0),
        ("1970-01-01T01:00:00Z", 3600.0),
        ("1970-01-01T01:00:00.5+01:00", 0.5),
        ("1970-01-01 01:00:00", 3600.0),
        ("1970-01-01t01:00:00z", 3600.0),
        ("0001-01-01T00:00:00+10:00", 0.0),
        ("9999-12-31T23:59:59-10:00", 253_402_300_799.0),
        (5, 5.0),
        (5.5, 5.5),
    ],
)
def test_times_are_in_utc_if_they_do_not_say_otherwise(text: object, seconds: float) -> None:
    assert read_time("since", text) == seconds


def test_the_grace_is_a_number_of_seconds() -> None:
    assert read_grace({}) == read_grace({"grace": None}) == 0.0
    assert read_grace({"grace": 5}) == 5.0
    for wrong in ({"grace": -1}, {"grace": "1d"}, {"grace": True}, {"grace": 1e9}, {"graze": 5}):
        with pytest.raises(InvalidRequest):
            read_grace(wrong)
