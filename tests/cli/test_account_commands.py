"""The commands ``keys`` and ``usage``: what they request and what they print."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import Main, one_line
from scripted_node import ScriptedNode, serve_scripted

KEY: dict[str, Any] = {
    "name": "ann",
    "models": ["qwen*", "b"],
    "role": "inference",
    "requests_per_minute": 60,
    "tokens_per_minute": None,
    "max_concurrency": None,
    "budget": {"tokens": 5, "per": "day"},
    "priority": "normal",
    "weight": 1.0,
    "expires_at": None,
    "disabled": False,
    "created_at": "2026-11-27T10:00:00Z",
}
USAGE = {
    "data": [
        {
            "key": "ann", "model": "=m", "requests": 3, "completed": 1, "failed": 1, "cancelled": 1,
            "prompt_tokens": 10, "completion_tokens": 20, "cached_tokens": 0, "usage_unknown": 2,
        }
    ]
}  # fmt: skip


@pytest.fixture
def node() -> Iterator[tuple[type[ScriptedNode], int]]:
    with serve_scripted(KEY | {"key": "tc-secret", "data": [KEY], "revoked": True}) as served:
        yield served


def sent(node: tuple[type[ScriptedNode], int]) -> tuple[str, str, Any]:
    """Return method, path and JSON of the last request."""
    method, path, _, body = node[0].requests[-1]
    return method, path, body


def test_a_new_key_is_alone_on_standard_output(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    code, out, err = main("keys", "create", "ann", f"http://127.0.0.1:{node[1]}", "--api-key", "k")
    assert (code, out) == (0, "tc-secret\n")
    assert "only time" in err
    assert "tc-secret" not in err
    assert sent(node) == ("POST", "/cluster/keys", {"name": "ann"})
    assert node[0].requests[-1][2] == "Bearer k"


def test_flags_become_fields(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    flags = (
        "--models qwen*,b --role operator --requests-per-minute 60 --tokens-per-minute none --max-concurrency 2"
        " --budget 1000/week --priority low --weight 0.5 --expires 2026-12-31"
    )
    assert main("keys", "create", "ann", *flags.split(), str(node[1]))[0] == 0
    fields = {
        "models": ["qwen*", "b"],
        "role": "operator",
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "max_concurrency": 2,
        "budget": {"tokens": 1000, "per": "week"},
        "priority": "low",
        "weight": 0.5,
        "expires_at": "2026-12-31",
    }
    assert sent(node) == ("POST", "/cluster/keys", {"name": "ann"} | fields)
    assert main("keys", "change", "ann", *flags.split(), "--disabled", "yes", str(node[1]))[0] == 0
    assert sent(node) == ("PATCH", "/cluster/keys/ann", fields | {"disabled": True})


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("12h", 43_200), ("30d", 2_592_000)])
def test_an_end_may_be_a_time_from_now(
    main: Main, node: tuple[type[ScriptedNode], int], text: str, seconds: int
) -> None:
    main("keys", "create", "ann", "--expires", text, str(node[1]))
    assert 0 <= time.time() + seconds - sent(node)[2]["expires_at"] < 5


def test_limits_and_ends_can_be_taken_away(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    main("keys", "change", "ann", "--budget", "none", "--expires", "never", str(node[1]))
    assert sent(node)[2] == {"budget": None, "expires_at": None}


def test_rotate_revoke_show(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    code, out, err = main("keys", "rotate", "ann", "--grace", "1d", str(node[1]))
    assert (code, out) == (0, "tc-secret\n")
    assert "works for 1d" in err
    assert sent(node) == ("POST", "/cluster/keys/ann/rotate", {"grace": 86_400})
    assert "no longer" in main("keys", "rotate", "ann", str(node[1]))[2]
    assert sent(node)[2] == {"grace": 0}
    assert main("keys", "revoke", "a b", str(node[1]))[:2] == (0, "key 'a b': revoked\n")
    assert sent(node) == ("DELETE", "/cluster/keys/a%20b", None)
    out = main("keys", "show", "ann", str(node[1]))[1]
    assert 'budget: {"tokens": 5, "per": "day"}\n' in out
    assert sent(node) == ("GET", "/cluster/keys/ann", None)


def test_keys_are_a_table(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    assert main("keys", "list", str(node[1]))[1] == textwrap.dedent("""\
        NAME  ROLE       MODELS    REQUESTS/MIN  TOKENS/MIN  CONCURRENCY  BUDGET  PRIORITY  WEIGHT  EXPIRES  DISABLED
        ann   inference  qwen*, b  60            -           -            5/day   normal    1.0     -        no
        """)
    assert json.loads(main("keys", "list", "--json", str(node[1]))[1])["data"] == [KEY]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("keys create ann --budget 5", "--budget: expected TOKENS/day"),
        ("keys create ann --requests-per-minute x", "--requests-per-minute: expected a whole number"),
        ("keys create ann --requests-per-minute -5", "--requests-per-minute"),
        ("keys create ann --expires soon", "--expires: expected a duration"),
        ("keys rotate ann --grace 5", "--grace: expected a duration"),
        ("keys change ann", "nothing to change"),
        ("keys create ann --role root", "invalid choice: 'root'"),
        ("keys create", "the following arguments are required: NAME"),
        ("keys", "the following arguments are required: COMMAND"),
        ("keys create ann 8080 8081", "unrecognized arguments: 8081"),
        ("usage --csv --json", "not allowed with"),
        ("audit --csv --json", "not allowed with"),
        ("audit --limit many", "--limit"),
    ],
)
def test_a_wrong_flag_is_one_line(main: Main, arguments: str, message: str) -> None:
    code, out, err = main(*arguments.split())
    assert (code, out) == (2, "")
    assert message in one_line(err)


def test_what_the_node_refuses_is_one_line(main: Main, node: tuple[type[ScriptedNode], int]) -> None:
    node[0].status = 409
    node[0].body = json.dumps(
        {"error": {"message": "There is a key 'ann' already", "code": "name_taken"}}
    ).encode()
    code, out, err = main("keys", "create", "ann", str(node[1]))
    assert (code, out) == (1, "")
    assert one_line(err).endswith("There is a key 'ann' already")


def test_usage_is_a_table_or_lines_for_a_spreadsheet(main: Main) -> None:
    with serve_scripted(USAGE) as node:
        assert main("usage", str(node[1]))[1] == textwrap.dedent("""\
            KEY  MODEL  REQUESTS  COMPLETED  FAILED  CANCELLED  PROMPT TOKENS  COMPLETION TOKENS  CACHED TOKENS  USAGE UNKNOWN
            ann  =m     3         1          1       1          10             20                 0              2
            """)  # noqa: E501
        assert sent(node)[1] == "/cluster/usage?group_by=key%2Cmodel"
        out = main(
            "usage", "--since", "2026-01-01T00:00:00+01:00", "--group-by", "model", "--csv", str(node[1])
        )[1]
        assert out == (
            "model,requests,completed,failed,cancelled,prompt_tokens,completion_tokens,cached_tokens,usage_unknown\n"
            "'=m,3,1,1,1,10,20,0,2\n"
        )
        assert sent(node)[1] == "/cluster/usage?since=2026-01-01T00%3A00%3A00%2B01%3A00&group_by=model"
        assert json.loads(main("usage", "--json", str(node[1]))[1]) == USAGE
    with serve_scripted({"data": []}) as node:
        assert main("usage", str(node[1]))[1] == "no requests\n"


def test_the_audit_log_is_a_table_or_lines_for_a_spreadsheet(main: Main) -> None:
    entry = {
        "time": "2026-11-01T10:00:00Z",
        "principal": "ops",
        "address": "10.0.0.7",
        "action": "worker.drain",
    }
    entries = {"data": [{**entry, "target": "gpu\x1b[1m", "details": {"a": 1}}, {**entry, "details": "?"}, 7]}
    with serve_scripted(entries) as node:
        assert main("audit", "--limit", "5", str(node[1]))[1] == textwrap.dedent("""\
            TIME                  WHO  FROM      ACTION        TARGET   DETAILS
            2026-11-01T10:00:00Z  ops  10.0.0.7  worker.drain  gpu?[1m  a=1
            2026-11-01T10:00:00Z  ops  10.0.0.7  worker.drain  -        -
            """)
        assert sent(node)[1] == "/cluster/audit?limit=5"
        lines = main("audit", "--csv", str(node[1]))[1].splitlines()
        assert lines[0] == "time,principal,address,action,target,details"
        assert lines[1].endswith(',"{""a"": 1}"')
        assert json.loads(main("audit", "--json", str(node[1]))[1]) == entries
    with serve_scripted({"data": []}) as node:
        assert main("audit", str(node[1]))[1] == "no entries\n"
