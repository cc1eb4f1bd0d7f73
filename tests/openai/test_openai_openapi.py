"""The description of the routes and the readers agree on which requests are valid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from described import fits, fitting, nearly_fitting
from hypothesis import given, strategies as st
from openai_answers import FORM, form
from openai_drawn import EXAMPLES, PATHS, form_parts, named, schema_of

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS, ERROR, Endpoint
from trio_cluster.openai.openapi import _describe
from trio_cluster.openai.requests.checks import Check, Custom, ListOf, ObjectOf, OneOf
from trio_cluster.openai.requests.fields import OnlyIf, Table, Uploads
from trio_cluster.openai.requests.schemas import by_type, members_of, or_null


def is_taken(endpoint: Endpoint, value: Any) -> InvalidRequest | None:
    try:
        endpoint.parse(json.dumps(value).encode(), "application/json", {})
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.parametrize("name", named(with_form=False))
@given(data=st.data())
@EXAMPLES
def test_what_fits_the_description_is_taken(name: str, data: st.DataObject) -> None:
    endpoint = ENDPOINTS[name]
    value = data.draw(fitting(schema_of(endpoint)))
    error = is_taken(endpoint, value)
    assert error is None, (error, value)


@pytest.mark.parametrize("name", named(with_form=False))
@given(data=st.data())
@EXAMPLES
def test_what_does_not_fit_the_description_is_refused(name: str, data: st.DataObject) -> None:
    endpoint = ENDPOINTS[name]
    schema = schema_of(endpoint)
    value = data.draw(nearly_fitting(schema))
    error = is_taken(endpoint, value)
    assert (error is None) == fits(schema).is_valid(value), (error, value)


@pytest.mark.parametrize("name", named(with_form=True))
@given(data=st.data())
@EXAMPLES
def test_a_form_that_fits_the_description_is_taken(name: str, data: st.DataObject) -> None:
    endpoint = ENDPOINTS[name]
    fields, files = data.draw(form_parts(endpoint))
    read = endpoint.parse(form(*fields, *files), FORM, {})
    assert ("model", read.model) in fields
    for missing in files:
        with pytest.raises(InvalidRequest) as caught:
            endpoint.parse(form(*fields, *(file for file in files if file is not missing)), FORM, {})
        assert caught.value.param == missing[0]


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
def test_every_endpoint_names_its_table_and_is_described_by_it(endpoint: Endpoint) -> None:
    assert endpoint.table is not None
    schema = schema_of(endpoint)
    fits(schema).check_schema(schema)
    assert {"model"} <= set(schema["required"]) <= set(schema["properties"])
    assert schema["additionalProperties"] is True
    for field, each in schema["properties"].items():
        assert each, f"{field} is not described"
        if "default" in each:
            assert fits(each).is_valid(each["default"])


def test_defaults_are_those_of_the_request() -> None:
    properties = schema_of(ENDPOINTS["chat.completions"])["properties"]
    assert properties["temperature"] == {
        "type": ["number", "null"], "minimum": 0, "maximum": 2, "default": 1.0
    }  # fmt: skip
    assert (properties["stream"]["default"], properties["n"]["default"]) == (False, 1)
    assert "default" not in properties["max_tokens"]
    assert "default" not in properties["model"]


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
def test_every_operation_lists_the_errors_that_it_may_end_in(endpoint: Endpoint) -> None:
    operation = PATHS[f"/v1{endpoint.path}"]["post"]
    assert operation["operationId"] == endpoint.name
    assert operation["tags"] == [endpoint.kind]
    assert set(operation["responses"]["200"]["content"]) == set(endpoint.answers)
    errors = {400, 401, 404, 413, 415, 429, 500, 502, 503, 504}
    statuses = {200} | {endpoint.errors.statuses.get(status, status) for status in errors}
    assert {str(status) for status in statuses} | {"default"} <= set(operation["responses"])


@given(message=st.text(), param=st.none() | st.text(), code=st.none() | st.text())
def test_every_error_fits_its_description(message: str, param: str | None, code: str | None) -> None:
    assert fits(ERROR).is_valid(InvalidRequest(message, param=param, code=code).envelope())


def test_an_endpoint_without_a_table_is_described_as_taking_anything_for_its_model() -> None:
    chat = ENDPOINTS["chat.completions"]
    plain = Endpoint("own", "/own", chat.kind, chat.parse, chat.encoder)
    schema = _describe(plain)["requestBody"]["content"]["application/json"]["schema"]
    assert fits(schema).is_valid({"model": "m", "what": ["ever"]})
    assert not fits(schema).is_valid({"what": "ever"})


# The words


def test_a_check_without_a_schema_is_described_as_taking_anything() -> None:
    assert Check().schema() == Custom(lambda value, name: value).schema() == {}
    assert or_null({}) == {}


def test_a_refused_word_has_its_reason_in_the_error_and_is_not_described() -> None:
    check = OneOf(("b64_json",), {"url": "nothing is kept"})
    assert check.schema() == {"type": "string", "enum": ["b64_json"]}
    with pytest.raises(InvalidRequest, match="'f' must be 'b64_json': nothing is kept") as caught:
        check("url", "f")
    assert (caught.value.param, caught.value.code) == ("f", "unsupported_value")
    with pytest.raises(InvalidRequest, match="expected 'b64_json', but got"):
        check("pixels", "f")


@pytest.mark.parametrize(
    ("schema", "wider"),
    [
        ({"type": "string", "enum": ["a"]}, {"type": ["string", "null"], "enum": ["a", None]}),
        ({"anyOf": [{"type": "string"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"enum": [1]}, {"anyOf": [{"enum": [1]}, {"type": "null"}]}),
    ],
)
def test_null_is_an_absent_field(schema: dict[str, Any], wider: dict[str, Any]) -> None:
    assert or_null(schema) == wider
    assert fits(wider).is_valid(None)


def test_objects_with_a_type() -> None:
    text = members_of({"text": {"type": "string"}}, ("text",))
    id_ = members_of({"id": {"type": "string"}}, ("id",))
    open_ = fits(by_type({"text": text}, common=id_))
    assert open_.is_valid({"type": "text", "text": "a", "id": "1"})
    assert open_.is_valid({"type": "video", "id": "1"})
    assert not open_.is_valid({"type": "text", "id": "1"})
    assert not open_.is_valid({"text": "a", "id": "1"})
    assert not open_.is_valid({"type": "video"})
    assert fits(by_type({"text": text}, default="text")).is_valid({"text": "a"})
    assert not fits(by_type({"text": text}, closed=True)).is_valid({"type": "video"})


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": False}, {"b": "y"}]
)
@pytest.mark.parametrize("by_default", [False, True])
def test_a_rule_and_its_description_agree(value: dict[str, Any], by_default: bool) -> None:
    rule = OnlyIf("a", "b", ("x", "z"), by_default)
    if fits(rule.schema()).is_valid(value):
        rule.check(value)
    else:
        with pytest.raises(InvalidRequest, match="'a' is only allowed when 'b' is 'x' or 'z'") as caught:
            rule.check(value)
        assert caught.value.param == "a"


def test_a_form_may_have_several_files_of_a_name() -> None:
    table = Table(("model",), {"model": OneOf(("m",))}, files={"image": Uploads(1, 2), "mask": Uploads(0, 1)})
    properties = table.schema()["properties"]
    assert table.is_form
    assert (properties["image"]["type"], properties["image"]["maxItems"]) == ("array", 2)
    assert properties["mask"]["type"] == "string"
    assert table.schema()["required"] == ["model", "image"]
    assert ListOf(ObjectOf()).schema() == {"type": "array", "items": {"type": "object"}}
