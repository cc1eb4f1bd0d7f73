"""``check-config`` and ``schema``: what the file of options may have in it, in words and as a JSON Schema."""

from __future__ import annotations

import json
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
from certificates import authority, now
from command_line import Main, one_line

from trio_cluster.cli.schema import configuration_schema, option_descriptions
from trio_cluster.cli.settings import SECRET_FILES, load_options
from trio_cluster.errors import OptionsError
from trio_cluster.options import ClusterServerOptions, ServerOptions

SCHEMA = configuration_schema()
FIELDS = [
    *(("server", field.name) for field in attrs.fields(ServerOptions)),
    *(("", field.name) for field in attrs.fields(ClusterServerOptions) if field.name != "server"),
]
#: Values to try with each option, as they are written in TOML.
SAMPLES = [
    "true", "0", "1", "-1", "65535", "65536", "0.05", "0.5", "1.5", "7.5", "-0.5", "''", "'a'", "' a'", "'two words'",
    "'schlüssel'", "'lean'", "'hypercorn'", "'auto'", "'off'", "'end'", "'abort'", "'reject'", "'replicate'", "'cost'",
    "'least-busy'", "'allow'", "'refuse'", "'sqlite:///k.db'", "'postgresql://u@h/n'", "'redis://h'", "'rediss://h'",
    "'http://h'", "[]", "['a']", "{}", "{a = 'b'}", "{a = ['b', 'c']}", "{a = {b = 0.9, c = 0.1}}", "{a = 1}",
    "{a = []}", "1979-05-27",
]  # fmt: skip


def valid(file: str) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(tomllib.loads(file))


def accepted(file: str, place: Path) -> bool:
    path = place / "c.toml"
    path.write_text(file, encoding="utf-8")
    try:
        load_options(config=path, environ={}, flags={})
    except OptionsError as error:
        # A rule between two options is no part of the schema.
        return "worker_timeout (" in str(error)
    return True


def test_the_schema_is_one_and_has_every_option_with_its_description() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    server = SCHEMA["properties"]["server"]["properties"]
    assert server.keys() >= attrs.fields_dict(ServerOptions).keys()
    assert SCHEMA["properties"].keys() >= attrs.fields_dict(ClusterServerOptions).keys()
    assert {*server, *SCHEMA["properties"]} >= SECRET_FILES.keys()
    for table in (server, SCHEMA["properties"]):
        assert [name for name, about in table.items() if len(about["description"]) < 20] == []
    assert set(option_descriptions()) >= {name for _, name in FIELDS}
    assert not [text for text in option_descriptions().values() if "``" in text]


@pytest.mark.parametrize(("table", "option"), FIELDS, ids=lambda text: text)
def test_the_schema_accepts_what_a_node_accepts(table: str, option: str, tmp_path: Path) -> None:
    head = f"[{table}]\n" if table else ""
    files = [f"{head}{option} = {value}" for value in SAMPLES]
    found = {file: accepted(file, tmp_path) for file in files}
    assert {file: valid(file) for file in files} == found
    assert any(found.values())
    assert not all(found.values())


@pytest.mark.parametrize(
    ("file", "is_valid"),
    [
        ("", True),
        ("log_level = 'debug'\nlog_format = 'json'", True),
        ("log_level = 'loud'", False),
        ("[server]\napi_key_file = '/run/secrets/k'", True),
        ("api_key_file = '/run/secrets/k'", False),
        ("unknown = 1", False),
        ("[server]\nunknown = 1", False),
        ("server = 1", False),
        ("app = 'models:server'", True),
        ("app = 'models'", False),
        ("[worker]\nmasters = ['a.lan:8080', 'b.lan:8080']", True),
        ("[worker]\nmasters = []", False),
        ("[worker]\nmasters = ['a.lan,b.lan']", False),
        ("masters = ['a.lan']", False),
    ],
)
def test_the_schema_knows_the_rest_of_the_file(file: str, is_valid: bool, tmp_path: Path) -> None:
    assert valid(file) is is_valid
    if "/run/secrets" not in file:
        assert accepted(file, tmp_path) is is_valid


def test_the_defaults_in_the_schema_are_valid() -> None:
    def defaults(table: dict[str, Any]) -> dict[str, Any]:
        return {name: about["default"] for name, about in table.items() if "default" in about}

    top = defaults(SCHEMA["properties"])
    jsonschema.validate(top | {"server": defaults(SCHEMA["properties"]["server"]["properties"])}, SCHEMA)


def test_the_command_prints_the_schema(main: Main) -> None:
    code, out, err = main("schema")
    assert (code, err, json.loads(out)) == (0, "", SCHEMA)


def test_a_file_is_put_into_words(main: Main, place: Path) -> None:
    (place / "c.toml").write_text(
        textwrap.dedent("""\
            log_level = "debug"
            drain_timeout = 120
            cluster_token = "sesame"

            [server]
            port = 9000
            keepalive = 10.0

            [aliases]
            "gpt-4o" = "qwen3-32b"
            any = ["a", "b"]
            canary = { a = 0.9, b = 0.1 }
            """)
    )
    code, out, err = main("check-config", "c.toml")
    assert (code, err) == (0, "")
    assert "sesame" not in out
    assert out.startswith(
        textwrap.dedent("""\
            c.toml has no errors. A node with it:
              - serves the API at http://0.0.0.0:9000
              - asks clients for no key, unless one was made with `trio-cluster keys create`
              - takes workers with the cluster_token at 0.0.0.0:10000, if it is a master
              - answers requests for gpt-4o with qwen3-32b
              - answers requests for any with a, else b
              - answers requests for canary with a (weight 0.9) or b (weight 0.1)

            log_level = debug
                The lowest level of what is logged.
            server.port = 9000   (default: 8080)
                The port of the OpenAI API; 0 picks a free one.
            cluster_token = (a secret)
                The secret that workers must send to join; left out: none is required.
            aliases = {"gpt-4o": "qwen3-32b", "any": ["a", "b"], "canary": {"a": 0.9, "b": 0.1}}
            """)
    )
    assert "drain_timeout = 120   (default: 30)\n    How long a node that stops" in out
    assert out.endswith("\nAll other options have their defaults.\n")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("[server]\ntls = 'auto'", "takes workers that were invited at 0.0.0.0:9080"),
        ("allow_anonymous_workers = true\n[server]\ntls = 'auto'", "takes workers without a token"),
        ("cluster_token = 't'\n[server]\ntls = 'auto'", "with the cluster_token or a certificate"),
        ("internal_host = '10.0.0.1'\ninternal_port = 7", "takes workers without a token at 10.0.0.1:7"),
        ("enable_cluster = false", "is alone: `trio-cluster run` takes no workers"),
        (
            "[server]\napi_key = 'k'\noperator_key = 'o'",
            "asks clients for a key (api_key or operator_key, or",
        ),
        ("[server]\ntls = 'auto'\nhost = '::'", "serves the API at https://[::]:8080"),
        ("[server]\ndefault_timeout = inf", "server.default_timeout = inf   (default: 60)"),
        (
            "[[serve]]\nengine = 'command'\ncommand = ['true', '{port}']\nmodels = ['a', 'b']",
            "  - serves a, b with the engine command\n",
        ),
        (
            "[[serve]]\nengine = 'openai'\nargument = 'http://127.0.0.1:1/v1'",
            "  - serves models with the engine openai (http://127.0.0.1:1/v1)\n",
        ),
        ("app = 'models:server'", "  - serves the models of the application models:server\n"),
        (
            "[worker]\nmasters = ['a.lan:8080', 'b.lan:8080']",
            "  - as a worker, links to a.lan:8080 and b.lan:8080\n",
        ),
    ],
)
def test_what_a_file_means_is_said(file: str, expected: str, main: Main, place: Path) -> None:
    (place / "c.toml").write_text(file)
    code, out, _ = main("check-config", "c.toml")
    assert code == 0
    assert expected in out


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("worker_timout = 3", "c.toml: worker_timout: unknown key; did you mean worker_timeout?"),
        (
            "[server]\ntimeout = 3",
            "c.toml: server.timeout: unknown key; did you mean server.default_timeout?",
        ),
        (
            "[server]\non_conflict = 'reject'",
            "did you mean on_conflict? It stands outside of [server]: above all tables",
        ),
        (
            "[worker]\nmemory = '4GiB'\n[[serve]]\nengine = 'command'\ncommand = ['true', '{port}']\n"
            "models = ['a']\nmemory = '5GiB'",
            "c.toml: [[serve]] 1: it needs 5 GiB of memory, and memory is 4GiB",
        ),
        ("app = 'models'", "c.toml: app: expected MODULE:ATTRIBUTE, got 'models'"),
        (
            "[worker]\nmasters = ['a.lan:80800']",
            "c.toml: worker.masters: expected the master's name or address, host:port or a URL",
        ),
        (
            "[worker]\nmasters = 'a.lan'",
            "c.toml: worker.masters: expected a list of addresses, such as ['a.lan:80",
        ),
        (
            "[worker]\nmasters = ['a.lan', 'ftp://b.lan']",
            "c.toml: worker.masters: expected the master's name or address, host:port or a URL",
        ),
        (
            "[worker]\nmasters = ['a.lan', 'https://b.lan']",
            "c.toml: worker.masters: either all masters speak TLS, or none does",
        ),
        ("[master]\nport = 1", "c.toml: master: unknown key; there are the tables [server], [worker]"),
        (
            "[server]\nport = 65000",
            "c.toml: server.port: there is no port 65000 + 1000 for workers; set internal_port",
        ),
        (
            "[server]\ntls_key = 'k.pem'",
            "c.toml: server.tls_key: it needs tls_cert, the certificate that it is for",
        ),
        ("[server]\ntls_cert = 'none.pem'", "none.pem"),
        ("ca_file = 'none.pem'", "c.toml: ca_file none.pem: "),
        (
            "cluster_token_file = 'none'",
            "c.toml: cluster_token_file (none): cannot be read: No such file or directory",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    file: str, expected: str, main: Main, place: Path
) -> None:
    (place / "c.toml").write_text(file)
    code, out, err = main("check-config", "c.toml")
    assert (code, out) == (2, "")
    assert expected in one_line(err)


def test_the_environment_is_no_part_of_the_file(
    main: Main, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "c.toml").write_text("")
    monkeypatch.setenv("TRIO_CLUSTER_PORT", "7")
    monkeypatch.setenv("TRIO_CLUSTER_PROT", "7")
    code, out, _ = main("check-config", "c.toml")
    assert code == 0
    assert ":8080" in out


def test_certificates_that_can_be_used_are_accepted(main: Main, place: Path) -> None:
    certificate = authority().server_certificate(["127.0.0.1"], now())
    (place / "c.toml").write_text(f"[server]\ntls_cert = '{certificate}'")
    code, out, _ = main("check-config", "c.toml")
    assert (code, "https://" in out) == (0, True)
