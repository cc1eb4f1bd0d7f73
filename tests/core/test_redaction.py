"""API keys are taken out of text that is logged."""

from __future__ import annotations

import io
import logging

import pytest

from trio_cluster.accounts.keys import new_key
from trio_cluster.cli import logs
from trio_cluster.core.redaction import has_key, without_keys


def test_every_key_that_is_made_is_recognized() -> None:
    for _ in range(200):
        key = new_key()
        assert has_key(f"a {key} b")
        assert without_keys(f"GET /cluster/keys/{key}/rotate") == "GET /cluster/keys/tc-.../rotate"


@pytest.mark.parametrize(
    "text", ["", "tc-", "tc-short", "etc-hosts-are-not-keys", "req_" + "0123456789abcdef" * 2]
)
def test_other_text_stays(text: str) -> None:
    assert not has_key(text)
    assert without_keys(text) == text


@pytest.mark.parametrize("format", logs.FORMATS)
@pytest.mark.usefixtures("restored_logging")
def test_no_line_of_the_log_has_a_key(format: str) -> None:
    stream, key = io.StringIO(), new_key()
    logs.configure("info", format, stream)
    logger = logging.getLogger("trio_cluster.some")
    logger.info("message %s", key, extra={"fields": {"field": key, "list": [key]}})
    try:
        raise ValueError(key)
    except ValueError:
        logger.exception("failed")
    assert stream.getvalue().count("tc-...") == 4
    assert key[3:] not in stream.getvalue()
