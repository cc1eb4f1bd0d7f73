"""The table of a route's fields: how a request is checked and converted, and how it is described.

Theory of operation
===================

A :class:`Table` goes through the fields that the client *sent*, not through those that it could have sent: a request
with three fields costs three look-ups. ``null`` is the same as an absent field. Fields that are not in the table are
not checked, and stay in ``raw``.

A route's description comes from the same table (see ``openai/openapi.py``). So whatever can be expressed in a table is
checked by the table alone, and the description agrees with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from trio_cluster.errors import InvalidRequest

from ..json_values import dumps
from .checks import Check, ListOf, missing
from .forms import File, Form
from .schemas import Schema, or_null

__all__ = ["OnlyIf", "Table", "Uploads"]


@attrs.frozen
class OnlyIf:
    """A rule: a field is allowed only with certain values of another field. Each of them also has a check."""

    field: str
    other: str
    values: tuple[Any, ...]
    by_default: bool = False
    """Whether the field is allowed when the other field is absent."""
    why: str = ""
    """The reason, for the error message."""

    def check(self, known: Mapping[str, Any]) -> None:
        """Apply the rule; a field that is ``False`` counts as absent.

        Raises:
            InvalidRequest: the field is there, and the other one has a wrong value.
        """
        if known.get(self.field, False) is False:
            return
        if self.by_default if self.other not in known else known[self.other] in self.values:
            return
        words = " or ".join(
            f"'{value}'" if isinstance(value, str) else dumps(value).decode() for value in self.values
        )
        raise InvalidRequest(
            f"'{self.field}' is only allowed when '{self.other}' is {words}{self.why and ': '}{self.why}",
            param=self.field,
            code="invalid_value",
        )

    def schema(self) -> Schema:
        """Return the rule as a schema."""
        allowed: Schema = {"enum": [*self.values, None] if self.by_default else list(self.values)}
        then: Schema = {"properties": {self.other: allowed}}
        if not self.by_default:
            then["required"] = [self.other]
        used = {"properties": {self.field: {"not": {"enum": [None, False]}}}, "required": [self.field]}
        return {"if": used, "then": then}


@attrs.frozen
class Uploads:
    """The files of one name that a form may have: ``least`` to ``most`` of them, none empty."""

    least: int = 1
    most: int = 1

    def read(self, form: Form, name: str) -> list[File]:
        """Return the files of this name, with or without ``[]`` after it, and take them out of the form.

        Raises:
            InvalidRequest: there are too few or too many, one is empty, or a text was sent instead of a file.
        """
        files = self.take(form, name)
        if name in form.fields or f"{name}[]" in form.fields:
            raise InvalidRequest(f"'{name}' must be an uploaded file with a file name, not text", param=name)
        if len(files) < self.least:
            raise missing(name)
        if len(files) > self.most:
            limit = "a single file" if self.most == 1 else f"at most {self.most} files"
            raise InvalidRequest(f"'{name}' must be {limit}", param=name)
        if not all(file.data for file in files):
            raise InvalidRequest("The uploaded file is empty", param=name)
        return files

    def take(self, form: Form, name: str) -> list[File]:
        """Do the same for a form that has been checked before. Checks nothing."""
        return [file for each in (name, f"{name}[]") for file in form.files.pop(each, ())]

    def schema(self) -> Schema:
        """Return the schema of such a part of a form."""
        one: Schema = {"type": "string", "contentMediaType": "application/octet-stream", "minLength": 1}
        if self.most == 1:
            return one
        return {"type": "array", "items": one, "minItems": max(self.least, 1), "maxItems": self.most}


class Table:
    """The documented fields of one route.

    Args:
        required: the names of the fields that must be there and not be ``null``.
        checks: the checks of the fields, by name.
        rules: which fields are allowed only with values of others.
        files: the files that a form has beside its fields, by name. A table without files is for a route that takes
            JSON.
    """

    def __init__(
        self,
        required: tuple[str, ...],
        checks: Mapping[str, Check],
        rules: tuple[OnlyIf, ...] = (),
        files: Mapping[str, Uploads] | None = None,
    ) -> None:
        self._required = required
        self._checks = dict(checks)
        self._conversions = {name: check.convert for name, check in checks.items() if check.converts}
        self._rules = rules
        self._files = dict(files or {})

    def read(self, sent: Mapping[str, Any], *, checked: bool = False) -> dict[str, Any]:
        """Return the documented fields of a JSON object that are there.

        Args:
            sent: the object.
            checked: it has passed this table before, on another node: only convert its fields, and check nothing.

        Raises:
            InvalidRequest: a field is missing or not allowed.
        """
        checks = self._checks
        known: dict[str, Any] = {}
        if checked:
            conversions = self._conversions
            for name, value in sent.items():
                if value is not None and name in checks:
                    known[name] = conversions[name](value) if name in conversions else value
            return known
        for name, value in sent.items():
            if value is not None and (check := checks.get(name)) is not None:
                known[name] = check(value, name)
        return self._complete(known)

    def read_form(self, sent: Mapping[str, Any], *, checked: bool = False) -> dict[str, Any]:
        """Return the documented fields of a form that are there; an empty text is an absent field.

        Lists are fields of the same name, with or without ``[]`` after it, or a single field.

        Args:
            sent: the fields of the form.
            checked: as for :meth:`read`.

        Raises:
            InvalidRequest: a field is missing or not allowed, or was given more than once without being a list.
        """
        known: dict[str, Any] = {}
        for sent_name, value in sent.items():
            name = sent_name.removesuffix("[]")
            check = self._checks.get(name)
            if check is None or value == "":
                continue
            known[name] = _convert_field(check, value) if checked else _check_field(check, value, name)
        return known if checked else self._complete(known)

    def _complete(self, known: dict[str, Any]) -> dict[str, Any]:
        for name in self._required:
            if name not in known:
                raise missing(name)
        for rule in self._rules:
            rule.check(known)
        return known

    def read_files(self, form: Form, *, checked: bool = False) -> dict[str, list[File]]:
        """Return the documented files of a form, and take them out of it.

        Args:
            form: the form.
            checked: as for :meth:`read`.

        Raises:
            InvalidRequest: a file is missing or not allowed.
        """
        if checked:
            return {name: uploads.take(form, name) for name, uploads in self._files.items()}
        return {name: uploads.read(form, name) for name, uploads in self._files.items()}

    @property
    def is_form(self) -> bool:
        """Whether the route takes a form instead of JSON."""
        return bool(self._files)

    def schema(self, defaults: Mapping[str, Any] | None = None) -> Schema:
        """Return the JSON Schema of the whole object, or of the parts of a form.

        Args:
            defaults: the defaults of the request's attributes, by name. A default that the field of this name could
                not have is ignored: the attribute is then another thing than the field.
        """
        properties: Schema = {}
        for name, check in self._checks.items():
            schema = check.schema()
            if not (self.is_form or name in self._required):
                schema = or_null(schema)
            if defaults is not None and name in defaults and _takes(check, defaults[name]):
                schema = schema | {"default": defaults[name]}
            properties[name] = schema
        files = {name: uploads.schema() for name, uploads in self._files.items()}
        needed = [*self._required, *(name for name, uploads in self._files.items() if uploads.least)]
        whole: Schema = {"type": "object", "properties": properties | files, "required": needed}
        whole["additionalProperties"] = True
        if self._rules:
            whole["allOf"] = [rule.schema() for rule in self._rules]
        return whole


def _check_field(check: Check, value: Any, name: str) -> Any:
    """Return what a field of a form is read into.

    Raises:
        InvalidRequest: the value is not allowed.
    """
    if isinstance(check, ListOf):
        return check.from_texts(value if isinstance(value, list) else [value], name)
    if isinstance(value, str):
        return check.from_text(value, name)
    if isinstance(value, dict):
        return check(value, name)
    if isinstance(value, list):
        raise InvalidRequest(f"Field '{name}' was given more than once", param=name)
    raise InvalidRequest(f"Field '{name}' must be text, not a file", param=name)


def _convert_field(check: Check, value: Any) -> Any:
    """Return what a field of a form is read into, if it has passed its check before."""
    if isinstance(check, ListOf):
        return check.convert_texts(value if isinstance(value, list) else [value])
    return check.convert_text(value) if isinstance(value, str) else check.convert(value)


def _takes(check: Check, value: Any) -> bool:
    try:
        check(value, "")
    except InvalidRequest:
        return False
    return True
