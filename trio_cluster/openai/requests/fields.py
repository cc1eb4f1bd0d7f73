"""The tables that say what a request to a route may have in it.

Theory of operation
===================

A :class:`Table` runs over what the client *sent*, not over what it could have sent: a request with three fields costs
three look-ups. ``null`` is the same as an absent field. Fields that a table does not know are nobody's business here
and pass.

A table is also where a route's description comes from (see ``openai/openapi.py``): so what a table says is all that is
checked of a request, wherever that can be said in a table.
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
    """A field that makes sense only where another one has one of some values; both are checked by themselves."""

    field: str
    other: str
    values: tuple[Any, ...]
    by_default: bool = False
    """Whether the other field, where it is not there, has one of them."""

    def check(self, known: Mapping[str, Any]) -> None:
        """Raise ``InvalidRequest`` where the field is used, and the other one has the wrong value."""
        if known.get(self.field, False) is False:
            return
        if self.by_default if self.other not in known else known[self.other] in self.values:
            return
        words = " or ".join(
            f"'{value}'" if isinstance(value, str) else dumps(value).decode() for value in self.values
        )
        raise InvalidRequest(
            f"'{self.field}' is only allowed when '{self.other}' is {words}",
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
    """The files of one name that a form may have: ``least`` to ``most``, and none of them empty."""

    least: int = 1
    most: int = 1

    def read(self, form: Form, name: str) -> list[File]:
        """Return the files of this name, with or without ``[]`` after it, and take them out of the form.

        Raises:
            InvalidRequest: there are too few or too many, one is empty, or text has come in place of a file.
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
        """Return what such a part of a form is."""
        one: Schema = {"type": "string", "contentMediaType": "application/octet-stream", "minLength": 1}
        if self.most == 1:
            return one
        return {"type": "array", "items": one, "minItems": max(self.least, 1), "maxItems": self.most}


class Table:
    """The documented fields of one route.

    Args:
        required: names that must be there and not be ``null``.
        checks: what the fields may be, by name.
        rules: which fields make sense only with others.
        files: the files that a form has beside its fields, by name. Without any, the route takes JSON.
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
        """Whether the route takes a form, and not JSON."""
        return bool(self._files)

    def schema(self, defaults: Mapping[str, Any] | None = None) -> Schema:
        """Return all of it as a JSON Schema of an object, or of the parts of a form.

        Args:
            defaults: values that fields have where they are not there, by name. What a field could not be is passed
                over: what it is read into has something else under that name.
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
