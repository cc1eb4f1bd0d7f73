"""Images in a stream, and images that are made from others."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from openai_answers import FORM, answer, answer_json, encoder, form, refused, send

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS, ImageEditRequest, OutputChunk
from trio_cluster.testing import read_stream

PNG = b"\x89PNG\r\n\x1a\n..."
JPEG = b"\xff\xd8\xff\xe0..."
MODELS: dict[str, Any] = {
    "image_generation.partial_image": ImageGenPartialImageEvent,
    "image_generation.completed": ImageGenCompletedEvent,
    "image_edit.partial_image": ImageEditPartialImageEvent,
    "image_edit.completed": ImageEditCompletedEvent,
}

Part = tuple[str, str] | tuple[str, str, bytes]


def edit(*parts: Part, image: tuple[Part, ...] = (("image", "a.png", PNG),)) -> ImageEditRequest:
    body = form(("model", "m"), ("prompt", "hi"), *image, *parts)
    request: ImageEditRequest = ENDPOINTS["images.edits"].parse(body, FORM, {})
    return request


def events(endpoint: str, request: Any, values: list[Any]) -> list[dict[str, Any]]:
    """Encode a stream of images; check that each event has the official form, and a name."""
    data = answer(endpoint, request, values)
    names = [
        line.removeprefix(b"event: ").decode() for line in data.split(b"\n") if line.startswith(b"event")
    ]
    report = read_stream(data)
    assert report.ending == "finished"
    assert b"[DONE]" not in data
    assert names == [each["type"] for each in report.events]
    for each in report.events:
        MODELS[each["type"]].model_validate(each, strict=True)
    return list(report.events)


def generated(values: list[Any], **fields: Any) -> list[dict[str, Any]]:
    return events("images.generations", send("images.generations", stream=True, **fields), values)


def edited(values: list[Any], *parts: Part) -> list[dict[str, Any]]:
    return events("images.edits", edit(("stream", "true"), *parts), values)


# In a stream


def test_a_streamed_image_comes_after_those_on_the_way_to_it() -> None:
    values = [OutputChunk.partial_image(PNG + b"0"), OutputChunk.partial_image(PNG + b"1"), PNG]
    *partial, last = generated(values, partial_images=2)
    assert [each["partial_image_index"] for each in partial] == [0, 1]
    assert [base64.b64decode(each["b64_json"]) for each in (*partial, last)] == [PNG + b"0", PNG + b"1", PNG]
    assert last["type"] == "image_generation.completed"
    assert "partial_image_index" not in last
    *partial, last = edited(values, ("partial_images", "2"))
    assert [each["type"] for each in (*partial, last)] == [
        *["image_edit.partial_image"] * 2,
        "image_edit.completed",
    ]


@pytest.mark.parametrize(("asked", "sent"), [(0, 0), (1, 1), (3, 2)])
def test_a_client_gets_no_more_partial_images_than_it_asked_for(asked: int, sent: int) -> None:
    values = [OutputChunk.partial_image(PNG), OutputChunk.partial_image(PNG), PNG]
    assert len(generated(values, partial_images=asked)) == sent + 1
    assert len(generated(values)) == 1
    plain = answer_json("images.generations", send("images.generations", partial_images=asked), values)
    assert len(plain["data"]) == 1


def test_events_repeat_what_was_asked_for_and_describe_what_was_made() -> None:
    asked = {"size": "512x768", "quality": "low", "background": "opaque", "output_format": "webp"}
    shown = {"created_at": 1_700_000_000} | asked
    (event,) = generated([b"raw"], **asked)
    assert event.items() > shown.items()
    (event,) = generated([JPEG], **asked)
    assert event["output_format"] == "jpeg"
    (event,) = generated([PNG], quality="hd")
    assert (event["quality"], event["size"], event["background"]) == ("high", "auto", "auto")


def test_a_handler_may_describe_its_image() -> None:
    values = [{"size": "64x64"}, OutputChunk.partial_image(PNG), PNG, {"seed": 7, "type": "x", "usage": {}}]
    partial, last = generated(values, partial_images=1)
    assert (partial["size"], last["size"], last["seed"]) == ("64x64", "64x64", 7)
    assert "seed" not in partial


def test_the_last_event_of_a_streamed_image_has_its_usage() -> None:
    nothing = {"text_tokens": 0, "image_tokens": 0}
    assert generated([PNG])[0]["usage"] == {
        "input_tokens": 0, "input_tokens_details": nothing, "output_tokens": 0, "total_tokens": 0,
    }  # fmt: skip
    partial, last = generated(
        [OutputChunk.usage(3, 4), OutputChunk.partial_image(PNG), PNG], partial_images=1
    )
    assert "usage" not in partial
    assert last["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
        "output_tokens": 4,
        "total_tokens": 7,
    }


def test_a_stream_is_not_completed_before_the_handler_has_ended() -> None:
    writer = encoder("images.generations", send("images.generations", stream=True))
    assert writer.streaming
    assert writer.head.content_type == "text/event-stream"
    assert writer.encode(PNG) == b""
    assert writer.finish().startswith(b"event: image_generation.completed\n")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([], ValueError),
        ([OutputChunk.partial_image(PNG)], ValueError),
        ([PNG, PNG], ValueError),
        ([PNG, OutputChunk.partial_image(PNG)], ValueError),
        ([OutputChunk.partial_image(b"")], ValueError),
        ([b""], ValueError),
        (["x"], TypeError),
        ([OutputChunk.audio(PNG)], TypeError),
    ],
)
def test_output_that_makes_no_stream_of_an_image_is_the_handlers_failure(
    values: list[Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        generated(values)
    with pytest.raises(error):
        edited(values)


def test_a_stream_has_one_image() -> None:
    error = refused("images.generations", stream=True, n=2)
    assert (error.status, error.param) == (400, "stream")
    assert error.message == "'stream' is only allowed when 'n' is 1"
    assert send("images.generations", stream=True, n=1).stream
    assert send("images.generations", stream=False, n=2).n == 2
    with pytest.raises(InvalidRequest, match="'n' is 1"):
        edit(("stream", "true"), ("n", "2"))


# Made from others


def test_an_edit_has_its_images_and_its_mask() -> None:
    request = edit(
        ("mask", "mask.png", b"mask"), image=(("image[]", "a.png", PNG), ("image[]", "b.jpg", JPEG))
    )
    assert request.images == [PNG, JPEG]
    assert request.image_types == ["audio/wav"] * 2  # as in the form
    assert request.mask == b"mask"
    assert (request.prompt, request.n, request.size, request.input_fidelity) == ("hi", 1, "auto", "low")
    assert request.raw == {"model": "m", "prompt": "hi"}
    assert edit().mask is None
    assert edit().images == [PNG]
    assert str(PNG) not in repr(request)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("n", "2", 2),
        ("size", "64x32", "64x32"),
        ("quality", "low", "low"),
        ("background", "transparent", "transparent"),
        ("output_format", "webp", "webp"),
        ("output_compression", "50", 50),
        ("response_format", "b64_json", "b64_json"),
        ("input_fidelity", "high", "high"),
        ("stream", "true", True),
        ("partial_images", "3", 3),
        ("user", "x", "x"),
    ],
)
def test_an_edit_is_asked_for_in_fields(field: str, text: str, value: Any) -> None:
    assert getattr(edit((field, text)), field) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("n", "0"),
        ("n", "11"),
        ("n", "two"),
        ("size", "big"),
        ("quality", "best"),
        ("background", "red"),
        ("output_format", "bmp"),
        ("output_compression", "101"),
        ("response_format", "url"),
        ("input_fidelity", "medium"),
        ("stream", "yes"),
        ("partial_images", "4"),
        ("prompt", "again"),
        ("mask", "text"),
    ],
)
def test_a_field_of_an_edit_with_a_wrong_value_is_refused_by_name(field: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        edit((field, text))
    assert (caught.value.status, caught.value.param) == (400, field)


@pytest.mark.parametrize("field", ["model", "prompt", "image"])
def test_what_an_edit_needs_must_be_there(field: str) -> None:
    parts: list[Part] = [("model", "m"), ("prompt", "hi"), ("image", "a.png", PNG)]
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS["images.edits"].parse(form(*(part for part in parts if part[0] != field)), FORM, {})
    assert (caught.value.param, caught.value.code) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("image", "a.png", PNG)] * 17, "image"),
        ([("image", "a.png", b"")], "image"),
        ([("image", "a.png", PNG), ("mask", "a", PNG), ("mask", "b", PNG)], "mask"),
        ([("image", "no file")], "image"),
    ],
)
def test_files_that_an_edit_cannot_have_are_refused(parts: list[Part], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        edit(image=tuple(parts))
    assert caught.value.param == param


def test_an_edit_is_a_form() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ENDPOINTS["images.edits"].parse(json.dumps({"model": "m"}).encode(), "application/json", {})
    assert caught.value.status == 415


def test_an_edit_is_answered_like_any_image() -> None:
    result = answer_json("images.edits", edit(("n", "2")), [[PNG, JPEG], OutputChunk.usage(3, 4)])
    ImagesResponse.model_validate(result, strict=True)
    assert [base64.b64decode(each["b64_json"]) for each in result["data"]] == [PNG, JPEG]
    assert result["usage"]["total_tokens"] == 7
    (event,) = edited([PNG])
    assert event["type"] == "image_edit.completed"
