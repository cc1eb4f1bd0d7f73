"""Valid requests, drawn from the description of the routes."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from described import fitting
from example_counts import examples
from hypothesis import HealthCheck, settings, strategies as st

from trio_cluster.openai import ENDPOINTS, Endpoint, describe_endpoints

PATHS = describe_endpoints()
# Reading a request costs little, and drawing one a lot; what is drawn first is as good as what comes later.
EXAMPLES = settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: The fields of a form, as name and text, and its files, as name, file name and content; see ``form``.
FormParts: TypeAlias = tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]


def schema_of(endpoint: Endpoint) -> dict[str, Any]:
    content = PATHS[f"/v1{endpoint.path}"]["post"]["requestBody"]["content"]
    (media_type,) = content
    schema: dict[str, Any] = content[media_type]["schema"]
    return schema


def named(*, with_form: bool) -> list[str]:
    return [name for name, each in ENDPOINTS.items() if each.table and each.table.is_form == with_form]


@st.composite
def form_parts(draw: st.DrawFn, endpoint: Endpoint) -> FormParts:
    """Draw the fields of a valid form; it has the files that are required."""
    schema = schema_of(endpoint)
    described = {
        part: each for part, each in schema["properties"].items() if "contentMediaType" not in str(each)
    }
    needed = [part for part in schema["required"] if part in described]
    only_fields = {"properties": described, "required": needed, "additionalProperties": False}
    fields = [
        (part, each if isinstance(each, str) else json.dumps(each))
        for part, value in draw(fitting(schema | only_fields)).items()
        for each in (value if isinstance(value, list) else [value])
    ]
    return fields, [(part, "a.wav", b"RIFF") for part in schema["required"] if part not in described]
