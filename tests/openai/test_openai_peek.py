"""The model that a request is for, found without more reading than that takes."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openai_answers import FORM, form

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import FormPeek, FormReader, is_form, peek_model
from trio_cluster.openai.requests.forms import MOST_PARTS, read_form

FILE = ("file", "a.wav", b"RIFF\r\n--\r\n--b\r--\n" * 3)
FIELDS = [("model", "m"), ("language", "de"), ("temperature", "0")]


def found(*pieces: bytes, content_type: str = FORM) -> str | None:
    peek = FormPeek(content_type)
    for piece in pieces:
        peek.feed(piece)
    return peek.model


# A form on its way through


@pytest.mark.parametrize("place", range(4))
def test_the_model_is_found_wherever_it_stands(place: int) -> None:
    fields = [("language", "de"), FILE, ("temperature", "0")]
    assert found(form(*fields[:place], ("model", "a model"), *fields[place:])) == "a model"


@settings(max_examples=300)
@given(st.permutations([FILE, *FIELDS]), st.data())
def test_the_model_is_found_in_any_pieces_of_a_form(
    parts: list[tuple[str, ...]], data: st.DataObject
) -> None:
    body = form(*parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    pieces = [body[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert found(*pieces) == "m"


def test_the_model_is_found_in_a_form_that_comes_byte_by_byte() -> None:
    body = form(FILE, *FIELDS)
    assert found(*(body[at : at + 1] for at in range(len(body)))) == "m"


def test_the_model_is_known_as_soon_as_it_has_come_by() -> None:
    body = form(*FIELDS, FILE)
    end = body.index(b"m\r\n") + len(b"m\r\n--") + len(FORM.partition("boundary=")[2]) + 2
    assert found(body[: end - 1]) is None
    assert found(body[:end]) == "m"


def test_what_follows_the_model_is_not_looked_at() -> None:
    assert found(form(*FIELDS, FILE), b"nonsense", b"--") == "m"


def test_the_model_is_found_behind_a_large_file() -> None:
    body = form(("file", "a.wav", bytes(3_000_000)), ("model", "m"))
    assert found(*(body[at : at + 65_536] for at in range(0, len(body), 65_536))) == "m"


@pytest.mark.parametrize("second", [("model", "b"), ("model", "a"), ("model", "m.txt", b"b")])
def test_of_two_models_none_is_taken(second: Any) -> None:
    with pytest.raises(InvalidRequest, match="more than once"):
        found(form(("model", "a"), FILE, second))
    with pytest.raises(InvalidRequest, match="more than once"):
        peek_model(form(("model", "a"), FILE, second), FORM)


def test_a_file_is_no_model() -> None:
    assert found(form(("model", "m.txt", b"m"), FILE)) is None


def test_a_form_without_a_model_has_none() -> None:
    assert found(form(("language", "de"), FILE)) is None


@pytest.mark.parametrize(
    "body",
    [
        b"no form at all\r\n" * 100 + b"--",
        form(("model", "m")).replace(b"\r\n", b"\n"),
        form(("model", "\xff")).replace("ÿ".encode(), b"\xff"),
        form(("model", "x" * 3000)),
        form(*[("x", "y")] * (MOST_PARTS + 1), ("model", "m")),
    ],
    ids=["no form", "line ends", "no text", "a long name", "many parts"],
)
def test_what_makes_no_sense_is_refused_or_has_no_model(body: bytes) -> None:
    with suppress(InvalidRequest):
        assert found(body) is None


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        FormPeek(content_type)
    assert caught.value.status == 400


@given(st.binary(max_size=200), st.integers(0, 200))
def test_nothing_but_a_refusal_comes_of_nonsense(noise: bytes, cut: int) -> None:
    body = form(*FIELDS)
    for each in (noise, body[:cut] + noise + body[cut:]):
        with suppress(InvalidRequest):
            found(each[:cut], each[cut:])


# A whole body


def test_the_model_is_found_in_json() -> None:
    assert peek_model(b'{"messages": [{"model": "no"}], "model": "m"}', "application/json") == "m"


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"[]", b'{"model": 5}', b'{"model": null}', b"{}", b'{"model": "\xff"}', b"[" * 5000],
)
def test_json_without_a_model_has_none(body: bytes) -> None:
    assert peek_model(body, "application/json") is None


def test_the_model_is_found_in_a_whole_form() -> None:
    assert peek_model(form(FILE, *FIELDS), FORM) == "m"
    assert peek_model(b"nonsense", FORM) is None
    assert peek_model(form(*FIELDS), "multipart/form-data") is None


@pytest.mark.parametrize(
    ("content_type", "is_one"),
    [
        (FORM, True),
        ("Multipart/Form-Data ; boundary=x", True),
        ("multipart/mixed; boundary=x", False),
        ("", False),
    ],
)
def test_a_form_is_recognised_by_its_content_type(content_type: str, is_one: bool) -> None:
    assert is_form(content_type) is is_one


# A form that is read while it comes in


@settings(max_examples=200)
@given(st.permutations([FILE, *FIELDS, ("file", "b.wav", b"")]), st.data())
def test_a_form_in_pieces_is_the_same_as_a_whole_one(
    parts: list[tuple[str, ...]], data: st.DataObject
) -> None:
    body = form(*parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    reader = FormReader(FORM)
    for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        reader.feed(body[begin:end])
    assert reader.finish() == read_form(body, FORM)


def test_a_form_that_is_not_complete_is_refused_at_its_end() -> None:
    reader = FormReader(FORM)
    reader.feed(form(*FIELDS, FILE)[:-10])
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        reader.finish()


def test_a_form_that_is_malformed_is_refused_where_it_is() -> None:
    reader = FormReader(FORM)
    reader.feed(form(*FIELDS, FILE)[:-10])
    boundary = FORM.partition("boundary=")[2].encode()
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        reader.feed(b"\r\n--" + boundary + b"nonsense")


def test_a_large_file_is_in_memory_once() -> None:
    size, piece = 8_000_000, bytes(64 * 1024)
    head, _, tail = form(("file", "a.wav", b"|"), ("model", "m")).partition(b"|")
    tracemalloc.start()
    try:
        reader = FormReader(FORM)
        reader.feed(head)
        for _ in range(size // len(piece)):
            reader.feed(piece)
        reader.feed(tail)
        (file,) = reader.finish().files["file"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file.data) == size // len(piece) * len(piece)
    assert peak < 1.3 * size
