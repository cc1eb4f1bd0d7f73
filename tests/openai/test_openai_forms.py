"""Forms: parts in any order, text converted into values, files distinguished from fields."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openai_answers import BOUNDARY, FORM, form, upload

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS

ROUTES = ["audio.transcriptions", "audio.translations"]

Part = tuple[str, str] | tuple[str, str, bytes]


def parse(*parts: Part, endpoint: str = "audio.transcriptions") -> Any:
    return ENDPOINTS[endpoint].parse(form(*parts), FORM, {})


def refused_form(body: bytes, content_type: str = FORM) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS["audio.transcriptions"].parse(body, content_type, {})
    return caught.value


def test_the_file_may_stand_anywhere() -> None:
    file: Part = ("file", "a.wav", b"RIFF\r\n--")
    fields: list[Part] = [("model", "w"), ("temperature", "0.2"), ("language", "de")]
    for place in range(len(fields) + 1):
        request = parse(*fields[:place], file, *fields[place:])
        assert (request.audio, request.filename, request.mime_type) == (b"RIFF\r\n--", "a.wav", "audio/wav")
        assert (request.model, request.temperature, request.language) == ("w", 0.2, "de")


@pytest.mark.parametrize(
    ("endpoint", "translate"), [("audio.transcriptions", False), ("audio.translations", True)]
)
def test_a_translation_is_distinguished_from_a_transcription(endpoint: str, translate: bool) -> None:
    assert upload(endpoint).translate is translate


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("1", 1.0), (".5", 0.5), ("5e-1", 0.5), ("1.", 1.0)])
def test_numbers_are_read_from_text(text: str, value: float) -> None:
    assert upload("audio.transcriptions", ("temperature", text)).temperature == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_booleans_are_read_from_text(text: str, value: bool) -> None:
    assert upload("audio.transcriptions", ("stream", text)).stream is value


@pytest.mark.parametrize("name", ["timestamp_granularities[]", "timestamp_granularities"])
def test_a_list_is_a_field_that_comes_again(name: str) -> None:
    request = upload("audio.transcriptions", (name, "word"), (name, "segment"))
    assert request.timestamp_granularities == ["word", "segment"]
    assert request.raw[name] == ["word", "segment"]


def test_a_list_of_one_is_a_field_that_comes_once() -> None:
    assert upload("audio.transcriptions", ("include[]", "logprobs")).include == ["logprobs"]


def test_a_list_may_be_numbered() -> None:
    request = upload(
        "audio.transcriptions",
        ("timestamp_granularities[0]", "word"),
        ("timestamp_granularities[1]", "segment"),
    )
    assert request.timestamp_granularities == ["word", "segment"]


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ([("chunking_strategy", "auto")], "auto"),
        ([("chunking_strategy", '{"type":"server_vad"}')], {"type": "server_vad"}),
        (
            [("chunking_strategy[type]", "server_vad"), ("chunking_strategy[threshold]", "0.5")],
            {"type": "server_vad", "threshold": "0.5"},
        ),
    ],
)
def test_an_object_comes_in_members_or_as_json(parts: list[Part], value: Any) -> None:
    assert upload("audio.transcriptions", *parts).chunking_strategy == value


def test_an_empty_text_is_an_absent_field() -> None:
    request = upload("audio.transcriptions", ("language", ""), ("temperature", ""), ("response_format", ""))
    assert (request.language, request.temperature, request.response_format) == (None, 0.0, "json")


def test_unknown_fields_and_files_are_in_raw() -> None:
    request = upload("audio.transcriptions", ("beam", "5"), ("beam", "6"), ("hints", "h.txt", b"abc"))
    assert request.raw == {"model": "m", "beam": ["5", "6"], "hints": [b"abc"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "warm"),
        ("temperature", "nan"),
        ("temperature", "1e999"),
        ("temperature", "1_0"),
        ("temperature", " 1"),
        ("temperature", "1.1"),
        ("response_format", "yaml"),
        ("response_format", "diarised_json"),
        ("stream", "yes"),
        ("timestamp_granularities[]", "minute"),
        ("chunking_strategy", "never"),
        ("chunking_strategy", "{"),
    ],
)
def test_a_field_with_a_wrong_value_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        upload("audio.transcriptions", (name, text))
    assert caught.value.param is not None
    assert caught.value.param.startswith(name.removesuffix("[]"))


@pytest.mark.parametrize("response_format", ["srt", "vtt", "verbose_json"])
def test_a_stream_of_a_format_that_needs_the_end_is_refused(response_format: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        upload("audio.transcriptions", ("stream", "true"), ("response_format", response_format))
    assert caught.value.param == "stream"


def test_a_translation_has_no_speakers() -> None:
    with pytest.raises(InvalidRequest) as caught:
        upload("audio.translations", ("response_format", "diarized_json"))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("endpoint", ROUTES)
@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("file", "a.wav", b"x")], "model"),
        ([("model", ""), ("file", "a.wav", b"x")], "model"),
        ([("model", "m")], "file"),
        ([("model", "m"), ("file", "@a.wav")], "file"),
        ([("model", "m"), ("file", "a.wav", b"")], "file"),
        ([("model", "m"), ("file", "a.wav", b"x"), ("file", "b.wav", b"x")], "file"),
        ([("model", "m"), ("model", "n"), ("file", "a.wav", b"x")], "model"),
        ([("prompt", "m"), ("prompt[a]", "n"), ("model", "m"), ("file", "a.wav", b"x")], "prompt[a]"),
        ([("prompt[a]", "m"), ("prompt", "n"), ("model", "m"), ("file", "a.wav", b"x")], "prompt"),
        ([("x[a]", "m"), ("x[a]", "n"), ("model", "m"), ("file", "a.wav", b"x")], "x[a]"),
    ],
)
def test_what_is_missing_or_there_twice_is_refused_by_name(
    endpoint: str, parts: list[Part], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(*parts, endpoint=endpoint)
    assert caught.value.status == 400
    assert caught.value.param == param


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "application/x-www-form-urlencoded", "multipart/mixed"]
)
def test_another_content_type_than_a_form_is_415(content_type: str) -> None:
    assert refused_form(b"{}", content_type).status == 415


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(("model", "m"))[:-6], FORM),
        (form(("model", "m")), "multipart/form-data"),
        (form(("model", "m")), "multipart/form-data; boundary=other"),
        (form(("model", "m")), "multipart/form-data; boundary=\ud800"),
        (f"--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), FORM),
        (form(("model", "m"), ("file", "a.wav", b"x"), *[("x", "y")] * 1000), FORM),
        (b"", FORM),
    ],
    ids=["cut", "no boundary", "other boundary", "odd boundary", "no disposition", "too many parts", "empty"],
)
def test_a_malformed_form_is_refused(body: bytes, content_type: str) -> None:
    assert refused_form(body, content_type).status == 400


def test_a_field_that_is_not_text_is_refused_by_name() -> None:
    body = form(("model", "m")).replace(b"\r\nm\r\n", b"\r\n\xff\r\n")
    assert refused_form(body).param == "model"


@given(
    st.lists(
        st.sampled_from(
            [
                f"--{BOUNDARY}\r\n".encode(),
                f"--{BOUNDARY}--\r\n".encode(),
                b"\r\n",
                b'Content-Disposition: form-data; name="model"\r\n\r\n',
                b'Content-Disposition: form-data; name="include[x]"\r\n\r\n',
                b'Content-Disposition: form-data; name="stream[0]"\r\n\r\n',
                b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n',
                b"Content-Length: 3\r\n",
                b": \r\n",
            ]
        )
        | st.binary(max_size=8),
        max_size=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_a_form_in_pieces_is_taken_or_refused_and_nothing_else(pieces: list[bytes]) -> None:
    try:
        request = ENDPOINTS["audio.transcriptions"].parse(b"".join(pieces), FORM, {})
    except InvalidRequest as error:
        error.envelope()
    else:
        assert isinstance(request.model, str)
