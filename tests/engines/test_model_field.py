"""Replacement of the model's name in a body, with everything else unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_cluster import ApiError
from trio_cluster.openai import FormRewriter, is_form, rewrite_form, rewrite_json
from trio_cluster.openai.requests.forms import read_form

TYPE = "multipart/form-data; boundary=abc"


def form(*parts: tuple[str, bytes], boundary: bytes = b"abc") -> bytes:
    """Return a form; a part is the rest of its header after ``form-data``, and its content."""
    framed = [
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, head.encode(), content)
        for head, content in parts
    ]
    return b"".join(framed) + b"--%b--\r\n" % boundary


def rewrite_in_pieces(body: bytes, model: str, size: int) -> bytes:
    rewriter = FormRewriter(TYPE, model)
    pieces = [rewriter.feed(body[start : start + size]) for start in range(0, len(body), size)]
    return b"".join([*pieces, rewriter.end()])


# JSON


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b"}'),
        (b'{"x":1.0e5,"model":"a","y":{"model": "a"}}', b'{"x":1.0e5,"model":"b","y":{"model": "a"}}'),
        (b'{"z": 12345678901234567890123, "model": null}', b'{"z":12345678901234567890123,"model":"b"}'),
        (b'{"t":"\\u00e9\\ud83d\\ude00\\/","model":"a"}', b'{"t":"\\u00e9\\ud83d\\ude00\\/","model":"b"}'),
        (b' {"model":"a","model":"c"} ', b'{"model":"b"}'),
        (b'{"x":[1 , 2]}', b'{"x":[1 , 2],"model":"b"}'),
    ],
)
def test_values_other_than_the_model_stay_byte_for_byte(body: bytes, expected: bytes) -> None:
    assert rewrite_json(body, "b") == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES), st.text(min_size=1))
def test_json_keeps_its_meaning_apart_from_the_model(fields: dict[str, Any], model: str) -> None:
    rewritten = json.loads(rewrite_json(json.dumps(fields).encode(), model))
    assert list(rewritten) == list({**fields, "model": model})
    assert rewritten == {**fields, "model": model}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"model"', b"{", b'{"model":"a"}x', b"\xff", b"\xef\xbb\xbf{}"]
)
def test_a_body_that_is_not_a_json_object_is_an_invalid_request(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        rewrite_json(body, "b")
    assert caught.value.status == 400


# Forms


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1 << 20])
def test_the_contents_of_a_form_stay_byte_for_byte(size: int) -> None:
    file = b"\r\n--ab\r\n--abd\r\n-abc\x00\xff" + bytes(range(256)) + b"\r\n\r\n"
    body = form(
        ('name="file"; filename="caf\u00e9 %22.wav"\r\nContent-Type: audio/wav', file),
        ('name="model"', b"ours"),
        ('name="model"; filename="model"', b"a file"),
        ('name="language"', "fran\u00e7ais".encode()),
        ('name="timestamp_granularities[]"', b"word"),
        ('name="empty"', b""),
    )
    rewritten = rewrite_in_pieces(body, "theirs", size)
    assert rewritten == body.replace(b"ours", b"theirs")
    assert read_form(rewritten, TYPE).files["file"][0].data == file


@given(
    st.lists(st.tuples(st.sampled_from(["a", "model", "b"]), st.binary(max_size=60)), max_size=6),
    st.integers(1, 50),
)
def test_any_form_comes_out_the_same_apart_from_the_model(parts: list[tuple[str, bytes]], size: int) -> None:
    parts = [(name, content.replace(b"--abc", b"")) for name, content in parts]
    body = form(*((f'name="{name}"', content) for name, content in parts))
    expected = form(
        *((f'name="{name}"', b"theirs" if name == "model" else content) for name, content in parts)
    )
    assert rewrite_in_pieces(body, "theirs", size) == expected


def test_bytes_around_a_form_are_dropped() -> None:
    body = form(('name="model"', b"ours"))
    assert rewrite_in_pieces(b"preamble\r\n" + body + b"epilogue" * 100, "ours", 10) == body


def test_a_large_part_is_passed_on_without_being_buffered() -> None:
    rewriter = FormRewriter(TYPE, "theirs")
    rewriter.feed(b'--abc\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n')
    piece = b"x" * 65536
    assert all(rewriter.feed(piece) == piece for _ in range(100))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--abc\r\n",
        b"--xyz\r\n\r\n--xyz--",
        form(('name="model"', b"ours"))[:-6],
        b"--abc\r\nno header\r\n\r\nx\r\n--abc--\r\n",
        b'--abc\r\nContent-Disposition: form-data; name="x"\r\nX: ' + b"a" * 20_000 + b"\r\n\r\nx\r\n--abc--",
    ],
)
def test_a_body_that_is_not_a_form_is_an_invalid_request(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        rewrite_form(body, TYPE, "theirs")
    assert caught.value.status == 400


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=\u20ac"])
def test_a_form_without_a_boundary_is_an_invalid_request(content_type: str) -> None:
    with pytest.raises(ApiError) as caught:
        FormRewriter(content_type, "theirs")
    assert caught.value.status == 400


def test_forms_are_recognized_by_their_content_type() -> None:
    assert is_form("Multipart/Form-Data ; boundary=x")
    assert not is_form("application/json")
    assert not is_form("")
