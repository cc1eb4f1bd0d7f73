"""Options: what a value may be, and how a file, the environment and flags are laid over each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_cluster.cli.settings import SECRET_FILES, load_options, load_serve_tables
from trio_cluster.errors import OptionsError
from trio_cluster.options import ClusterMode, ClusterServerOptions, ServerOptions


def load(
    toml: str | None = None,
    environ: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
    *,
    base: ClusterServerOptions | None = None,
    tmp_path: Path,
) -> ClusterServerOptions:
    config = None
    if toml is not None:
        config = tmp_path / "cluster.toml"
        config.write_text(toml, encoding="utf-8")
    return load_options(config=config, environ=environ or {}, flags=flags or {}, base=base)


def complaint(tmp_path: Path, *sources: Any, **more: Any) -> str:
    with pytest.raises(OptionsError) as caught:
        load(*sources, **more, tmp_path=tmp_path)
    return str(caught.value).replace(f"{tmp_path}/", "")


# The classes


def test_the_defaults_are_the_documented_ones() -> None:
    assert attrs.asdict(ClusterServerOptions()) == {
        "server": {
            "host": "0.0.0.0",
            "port": 8080,
            "max_concurrency": 10,
            "queue_timeout": 5.0,
            "default_timeout": 60.0,
            "api_key": None,
            "operator_key": None,
            "worker_id": None,
            "owner": "trio-cluster",
            "max_body_size": 512 * 1024 * 1024,
            "max_json_size": 64 * 1024 * 1024,
            "cors_origins": None,
            "access_log": False,
            "allowed_hosts": None,
            "http": "lean",
            "stream_failure": "end",
            "keepalive": 10.0,
            "tls": "off",
            "tls_cert": None,
            "tls_key": None,
            "tls_name": None,
        },
        "enable_cluster": True,
        "worker_timeout": 30.0,
        "heartbeat_interval": 5.0,
        "resume_window": 15.0,
        "through_proxy": False,
        "guardian": None,
        "internal_host": None,
        "internal_port": None,
        "cluster_token": None,
        "on_conflict": "reject",
        "routing": "cost",
        "aliases": None,
        "start_patience": 30.0,
        "wake": None,
        "wake_timeout": 180.0,
        "ejection_failures": 5,
        "ejection_time": 5.0,
        "ejection_time_max": 300.0,
        "ejection_share": 0.5,
        "batch_wait": 0.001,
        "memory": None,
        "drain_timeout": 30.0,
        "limits": None,
        "limits_failure": "allow",
        "processes": 1,
        "state_dir": None,
        "database": None,
        "usage_days": 90,
        "stored_responses": 10_000,
        "stored_responses_size": 64 * 1024 * 1024,
        "stored_responses_lifetime": 86_400.0,
        "stories": 10_000,
        "otel": "auto",
        "ca_file": None,
        "allow_anonymous_workers": False,
    }


def test_two_sets_of_options_share_nothing() -> None:
    one, other = ClusterServerOptions(), ClusterServerOptions()
    one.server.port = 1
    assert other.server.port == 8080


def test_whole_seconds_become_floats() -> None:
    options = ServerOptions(queue_timeout=2)
    assert isinstance(options.queue_timeout, float)
    options.default_timeout = 3
    assert isinstance(options.default_timeout, float)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_concurrency", 0),
        ("max_concurrency", -1),
        ("max_body_size", 0),
        ("port", -1),
        ("port", 65536),
        ("queue_timeout", -0.1),
        ("queue_timeout", math.inf),
        pytest.param("queue_timeout", 10**400, id="queue_timeout-huge"),
        ("default_timeout", 0),
        ("default_timeout", -math.inf),
        ("host", ""),
        ("host", " a"),
        ("host", "a\nb"),
        ("worker_id", "w\x1b[2J"),
        ("owner", ""),
        ("api_key", ""),
        ("api_key", "two words"),
        ("api_key", "schlüssel"),
        ("api_key", "newline\n"),
    ],
)
def test_a_value_out_of_range_is_refused_in_the_constructor_and_later(field: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=rf"^{field}: ") as caught:
        ServerOptions(**{field: value})
    assert isinstance(caught.value, ValueError)
    options = ServerOptions()
    before = attrs.asdict(options)
    with pytest.raises(OptionsError, match=rf"^{field}: "):
        setattr(options, field, value)
    assert attrs.asdict(options) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_concurrency", True),
        ("max_concurrency", 7.0),
        ("max_concurrency", "7"),
        ("port", True),
        ("port", None),
        ("queue_timeout", True),
        ("queue_timeout", "5"),
        ("queue_timeout", None),
        ("default_timeout", math.nan),
        ("host", 5),
        ("host", None),
        ("api_key", 5),
        ("api_key", b"key"),
        ("worker_id", 5),
    ],
)
def test_a_value_of_a_wrong_type_is_a_type_error(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{field}: "):
        ServerOptions(**{field: value})
    options = ServerOptions()
    with pytest.raises(TypeError, match=rf"^{field}: "):
        setattr(options, field, value)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("on_conflict", "replace", OptionsError),
        ("on_conflict", ["reject"], OptionsError),
        ("routing", "fastest", OptionsError),
        ("otel", "yes", OptionsError),
        ("enable_cluster", 1, TypeError),
        ("worker_timeout", math.inf, OptionsError),
        ("heartbeat_interval", 0, OptionsError),
        ("internal_port", 70000, OptionsError),
        ("cluster_token", "", OptionsError),
        ("drain_timeout", -1, OptionsError),
        ("ejection_failures", -1, OptionsError),
        ("ejection_time", 0, OptionsError),
        ("ejection_share", 1.1, OptionsError),
        ("ejection_share", "half", OptionsError),
        ("batch_wait", -0.001, OptionsError),
        ("batch_wait", 0.2, OptionsError),
        ("limits", "http://here", OptionsError),
        ("limits", 6379, TypeError),
        ("limits_failure", "ignore", OptionsError),
        ("server", 8080, TypeError),
    ],
)
def test_the_cluster_options_are_checked_too(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        ClusterServerOptions(**{field: value})
    with pytest.raises(error, match=field):
        setattr(ClusterServerOptions(), field, value)


def test_edges_that_mean_something_are_allowed() -> None:
    options = ClusterServerOptions(
        ServerOptions(port=0, queue_timeout=0, default_timeout=math.inf, worker_id=""), drain_timeout=0
    )
    assert options.server.default_timeout == math.inf
    assert options.server.worker_id is None


def test_a_link_must_outlast_its_heartbeats() -> None:
    with pytest.raises(OptionsError, match=r"worker_timeout \(5 s\).*heartbeat_interval \(5 s\)"):
        ClusterServerOptions(worker_timeout=5.0)
    options = ClusterServerOptions()
    with pytest.raises(OptionsError, match="worker_timeout"):
        options.worker_timeout = 4.0
    with pytest.raises(OptionsError, match="heartbeat_interval"):
        options.heartbeat_interval = 30.0
    options.heartbeat_interval = 1.0
    options.worker_timeout = 4.0


def test_secrets_are_in_no_repr_and_no_complaint() -> None:
    options = ClusterServerOptions(ServerOptions(api_key="sesame-1"), cluster_token="sesame-2")
    assert "sesame" not in repr(options)
    for wrong in ("sesame 3", "sesäme 4"):
        with pytest.raises(OptionsError) as caught:
            options.server.api_key = wrong
        assert wrong not in str(caught.value)


def test_a_mode_is_its_word() -> None:
    assert str(ClusterMode.MASTER) == "master" == ClusterMode.MASTER
    assert [str(mode) for mode in ClusterMode] == ["master", "worker", "standalone"]


# Loading


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path=tmp_path) == ClusterServerOptions()


def test_later_sources_win(tmp_path: Path) -> None:
    toml = "worker_timeout = 40\n[server]\nport = 1\nmax_concurrency = 1\nowner = 'file'\nhost = 'h'\n"
    environ = {"TRIO_CLUSTER_PORT": "2", "TRIO_CLUSTER_MAX_CONCURRENCY": "2", "TRIO_CLUSTER_OWNER": "env"}
    flags: dict[str, object] = {"port": 3, "max_concurrency": 3, "owner": None, "host": None}
    options = load(toml, environ, flags, tmp_path=tmp_path)
    assert options == ClusterServerOptions(
        ServerOptions(port=3, max_concurrency=3, owner="env", host="h"), worker_timeout=40.0
    )


def test_the_base_holds_where_no_source_sets_a_value_and_is_not_changed(tmp_path: Path) -> None:
    base = ClusterServerOptions(ServerOptions(port=1, owner="base"), on_conflict="replicate")
    options = load(None, {"TRIO_CLUSTER_PORT": "2"}, base=base, tmp_path=tmp_path)
    assert options == ClusterServerOptions(ServerOptions(port=2, owner="base"), on_conflict="replicate")
    assert base.server.port == 1
    options.server.port = 3
    assert base.server.port == 1


@pytest.mark.parametrize(
    "field",
    [*attrs.fields_dict(ServerOptions), *sorted(attrs.fields_dict(ClusterServerOptions).keys() - {"server"})],
)
def test_every_option_can_be_set_by_each_source(field: str, tmp_path: Path) -> None:
    in_server = field in attrs.fields_dict(ServerOptions)
    texts = {
        "enable_cluster": "false",
        "access_log": "yes",
        "on_conflict": "replicate",
        "routing": "least-busy",
        "stream_failure": "abort",
        "otel": "on",
        "heartbeat_interval": "7",
        "batch_wait": "0",
        "ejection_share": "1",
        "http": "hypercorn",
        "database": "sqlite:///keys.db",
        "tls": "auto",
        "allow_anonymous_workers": "yes",
        "limits": "redis://r/1",
        "limits_failure": "refuse",
        "processes": "4",
        "through_proxy": "yes",
        "guardian": "no",
        "aliases": '{"a": ["b", "c"]}',
        "wake": '{"a": "02:42:ac:11:00:02"}',
    }
    plain: dict[str, object] = {
        "access_log": True, "enable_cluster": False, "on_conflict": "replicate", "heartbeat_interval": 7,
        "batch_wait": 0, "ejection_share": 1, "http": "hypercorn", "database": "sqlite:///keys.db",
        "stream_failure": "abort", "tls": "auto", "otel": "on", "allow_anonymous_workers": True,
        "limits": "redis://r/1", "limits_failure": "refuse", "routing": "least-busy",
        "aliases": {"a": ["b", "c"]}, "through_proxy": True, "guardian": False, "processes": 4,
        "wake": {"a": "02:42:ac:11:00:02"},
    }  # fmt: skip
    kind = attrs.fields_dict(ServerOptions if in_server else ClusterServerOptions)[field].type
    text = texts.get(field, "77")
    value = plain.get(field, "77" if "str" in str(kind) else 77)
    quoted = str(value).lower() if isinstance(value, (bool, int)) else f'"{value}"'
    if isinstance(value, dict):
        quoted = f"{{ a = {value['a']!r} }}"
    for options in (
        load(f"{'[server]' if in_server else ''}\n{field} = {quoted}", tmp_path=tmp_path),
        load(None, {f"TRIO_CLUSTER_{field.upper()}": text}, tmp_path=tmp_path),
        load(None, None, {field: value}, tmp_path=tmp_path),
    ):
        assert getattr(options.server if in_server else options, field) == value


def test_a_misspelt_key_in_the_file_is_named_with_what_was_meant(tmp_path: Path) -> None:
    assert complaint(tmp_path, "[server]\nmax_concurency = 7") == (
        "cluster.toml: server.max_concurency: unknown key; did you mean server.max_concurrency?"
    )


def test_a_key_in_the_wrong_table_is_reported_with_the_right_one(tmp_path: Path) -> None:
    assert "max_concurrency: unknown key; did you mean server.max_concurrency?" in complaint(
        tmp_path, "max_concurrency = 7"
    )
    assert (
        "server.worker_timeout: unknown key; did you mean worker_timeout? It stands outside of [server]"
        in complaint(tmp_path, "[server]\nworker_timeout = 7")
    )


def test_a_key_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    assert complaint(tmp_path, "zzz = 7") == "cluster.toml: zzz: unknown key"


def test_a_misspelt_variable_is_named_with_what_was_meant(tmp_path: Path) -> None:
    assert complaint(tmp_path, None, {"TRIO_CLUSTER_MAX_CONCURENCY": "7"}) == (
        "TRIO_CLUSTER_MAX_CONCURENCY: unknown variable; did you mean TRIO_CLUSTER_MAX_CONCURRENCY?"
    )


@pytest.mark.parametrize("variable", ["TRIO_CLUSTER_", "TRIO_CLUSTER_SERVER", "TRIO_CLUSTER_port"])
def test_only_the_names_of_options_are_variables(variable: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, None, {variable: "7"}).startswith(f"{variable}: unknown variable")


def test_variables_that_are_not_options_are_left_to_those_who_read_them(tmp_path: Path) -> None:
    environ = dict.fromkeys(
        ["TRIO_CLUSTER_CACHE", "TRIO_CLUSTER_CONFIG", "TRIO_CLUSTER_LOG_LEVEL", "TRIO_CLUSTER_LOG_FORMAT"],
        "x",
    )
    assert load(None, environ | {"TRIO": "x", "HOME": "x"}, tmp_path=tmp_path) == ClusterServerOptions()


def test_the_service_links_of_kubernetes_are_not_taken_for_options(tmp_path: Path) -> None:
    environ = {
        "TRIO_CLUSTER_SERVICE_HOST": "10.0.0.1",
        "TRIO_CLUSTER_SERVICE_PORT": "8080",
        "TRIO_CLUSTER_SERVICE_PORT_HTTP": "8080",
        "TRIO_CLUSTER_PORT": "tcp://10.0.0.1:8080",
        "TRIO_CLUSTER_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "TRIO_CLUSTER_PORT_8080_TCP_PROTO": "tcp",
        "TRIO_CLUSTER_PORT_8080_TCP_PORT": "8080",
        "TRIO_CLUSTER_PORT_8080_TCP_ADDR": "10.0.0.1",
        "TRIO_CLUSTER_MASTER_SERVICE_HOST": "10.0.0.2",
        "TRIO_CLUSTER_MASTER_PORT": "tcp://10.0.0.2:8080",
    }
    assert load(None, environ, tmp_path=tmp_path) == ClusterServerOptions()


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ('[server]\nmax_concurrency = "7"', "server.max_concurrency: expected a whole number, got '7'"),
        ("[server]\nmax_concurrency = true", "server.max_concurrency: expected a whole number, got True"),
        ("[server]\nmax_concurrency = 7.5", "server.max_concurrency: expected a whole number, got 7.5"),
        ("[server]\nhost = 7", "server.host: expected text, got 7"),
        ("[server]\nhost = {a = 1}", "server.host: expected text, got {'a': 1}"),
        ("[server]\nport = 99999", "server.port: a port lies between 0 and 65535, got 99999"),
        ("[server]\napi_key = 1234", "server.api_key: expected text"),
        ("drain_timeout = nan", "drain_timeout: expected a number of seconds, got nan"),
        ("drain_timeout = 1979-05-27", "drain_timeout: expected a number of seconds, got datetime.date"),
        ("[server]\nstream_failure = 'x'", 'server.stream_failure: must be "end" or "abort", got \'x\''),
        ("enable_cluster = 'no'", "enable_cluster: expected true or false, got 'no'"),
        ("on_conflict = 'x'", 'on_conflict: must be "reject" or "replicate", got \'x\''),
        ("server = 5", "server: must be a table, [server]"),
        ("a = ", "is not TOML: "),
    ],
)
def test_a_wrong_value_in_the_file_is_named_by_file_and_key(toml: str, expected: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, toml).startswith(f"cluster.toml: {expected}")


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PORT", "http", "expected a port number, got 'http'"),
        ("PORT", "", "expected a port number, got ''"),
        ("MAX_CONCURRENCY", "7.5", "expected a whole number, got '7.5'"),
        ("QUEUE_TIMEOUT", "5s", "expected a number of seconds, got '5s'"),
        ("ENABLE_CLUSTER", "maybe", "expected true or false, got 'maybe'"),
        ("API_KEY", "", "must not be empty; leave it out to require none"),
        ("CLUSTER_TOKEN", "", "must not be empty; leave it out to require none"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, expected: str, tmp_path: Path) -> None:
    variable = f"TRIO_CLUSTER_{variable}"
    assert complaint(tmp_path, None, {variable: text}) == f"{variable}: {expected}"


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("TRUE", True), ("1", True), ("no", False), ("0", False)]
)
def test_yes_and_no_have_several_words_in_the_environment(text: str, value: bool, tmp_path: Path) -> None:
    assert load(None, {"TRIO_CLUSTER_ENABLE_CLUSTER": text}, tmp_path=tmp_path).enable_cluster is value


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("default_timeout", 0.0, "--timeout: must be"),
        ("worker_id", " ", "--name: must be"),
        ("port", 65536, "PORT: a port lies"),
        ("queue_timeout", -1.0, "--queue-timeout: must be"),
    ],
)
def test_a_wrong_flag_is_named_as_it_is_typed(
    field: str, value: object, expected: str, tmp_path: Path
) -> None:
    assert complaint(tmp_path, None, None, {field: value}).startswith(expected)


def test_all_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    text = complaint(tmp_path, "drain_timeout = -1\n[server]\nport = -1", {"TRIO_CLUSTER_OWNER": ""})
    assert "cluster.toml: drain_timeout: " in text
    assert "cluster.toml: server.port: " in text
    assert "TRIO_CLUSTER_OWNER: " in text


def test_a_rule_between_two_options_counts_only_the_values_that_won(tmp_path: Path) -> None:
    options = load("worker_timeout = 4", {"TRIO_CLUSTER_HEARTBEAT_INTERVAL": "1"}, tmp_path=tmp_path)
    assert (options.worker_timeout, options.heartbeat_interval) == (4.0, 1.0)
    assert complaint(tmp_path, "worker_timeout = 4").startswith("worker_timeout (4 s) must be longer")


def test_no_limit_can_be_written_in_each_source(tmp_path: Path) -> None:
    assert load("[server]\ndefault_timeout = inf", tmp_path=tmp_path).server.default_timeout == math.inf
    assert (
        load(None, {"TRIO_CLUSTER_DEFAULT_TIMEOUT": "inf"}, tmp_path=tmp_path).server.default_timeout
        == math.inf
    )


def test_a_secret_in_a_file_is_not_repeated_in_the_complaint(tmp_path: Path) -> None:
    assert "sesame" not in complaint(tmp_path, 'cluster_token = "sesame 1"\n[server]\napi_key = ["sesame"]')


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path / "none.toml", "none.toml: cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(OptionsError, match=expected):
            load_options(config=path, environ={}, flags={})
    latin = tmp_path / "latin.toml"
    latin.write_bytes("owner = 'Zoë'".encode("latin-1"))
    with pytest.raises(OptionsError, match=r"latin\.toml: is not UTF-8"):
        load_options(config=latin, environ={}, flags={})


# Secrets in files of their own


def test_the_options_that_are_secrets_may_be_in_files() -> None:
    assert sorted(SECRET_FILES.values()) == ["api_key", "cluster_token", "database", "limits", "operator_key"]


@pytest.mark.parametrize(("setting", "option"), SECRET_FILES.items())
def test_a_secret_is_read_from_the_file_that_each_source_names(
    setting: str, option: str, tmp_path: Path
) -> None:
    in_server = option in attrs.fields_dict(ServerOptions)
    secret = {"database": "sqlite:///keys.db", "limits": "redis://:pass@r/1"}.get(option, "sesame")
    file = tmp_path / "secret"
    file.write_text(f"{secret}\n")
    for options in (
        load(f"{'[server]' if in_server else ''}\n{setting} = '{file}'", tmp_path=tmp_path),
        load(None, {f"TRIO_CLUSTER_{setting.upper()}": str(file)}, tmp_path=tmp_path),
        load(None, None, {setting: str(file)}, tmp_path=tmp_path),
    ):
        assert getattr(options.server if in_server else options, option) == secret


def test_a_later_source_overrides_a_secret_whichever_of_the_two_it_gives(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from-the-file")
    toml = f"[server]\napi_key_file = '{file}'"
    assert load(toml, {"TRIO_CLUSTER_API_KEY": "env"}, tmp_path=tmp_path).server.api_key == "env"
    environ = {"TRIO_CLUSTER_API_KEY_FILE": str(file)}
    assert load("[server]\napi_key = 'a'", environ, tmp_path=tmp_path).server.api_key == "from-the-file"


def test_a_secret_that_one_source_gives_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("b")
    text = complaint(tmp_path, f"[server]\napi_key = 'a'\napi_key_file = '{file}'")
    assert text == (
        "cluster.toml: server.api_key_file (secret): is given twice: cluster.toml: server.api_key is the same option"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file or directory"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"two sesames", "may only have visible ASCII characters, and no spaces"),
        (b"s" * 70_000, "is too large for a secret"),
    ],
)
def test_a_file_without_a_usable_secret_is_named(
    content: bytes | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    text = complaint(tmp_path, None, {"TRIO_CLUSTER_API_KEY_FILE": str(file)})
    assert text == f"TRIO_CLUSTER_API_KEY_FILE (secret): {expected}"
    assert complaint(tmp_path, "cluster_token_file = 5") == (
        "cluster.toml: cluster_token_file: expected the name of a file, got 5"
    )
    assert "did you mean server.api_key_file?" in complaint(tmp_path, "[server]\napi_key_fil = 'x'")
    assert "did you mean TRIO_CLUSTER_API_KEY_FILE?" in complaint(
        tmp_path, None, {"TRIO_CLUSTER_API_KEYFILE": "x"}
    )


# What runs on demand


def test_the_memory_of_a_worker_is_read_from_its_table_the_environment_and_a_flag(tmp_path: Path) -> None:
    toml = '[worker]\nmemory = "24GiB"\n'
    assert load(toml, tmp_path=tmp_path).memory_size == 24 << 30
    assert load("memory = 1000\n", tmp_path=tmp_path).memory_size == 1000
    environ = {"TRIO_CLUSTER_MEMORY": "16GiB"}
    assert load(toml, environ, tmp_path=tmp_path).memory_size == 16 << 30
    assert load(toml, environ, {"memory": "8GiB"}, tmp_path=tmp_path).memory_size == 8 << 30
    assert load("", tmp_path=tmp_path).memory_size is None


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('[worker]\nmemory = "24 apples"', "cluster.toml: worker.memory: expected an amount of memory"),
        ("[worker]\nmemory = true", "cluster.toml: worker.memory: expected an amount of memory"),
        ("[worker]\nmemry = 5", "cluster.toml: worker.memry: unknown key; did you mean memory?"),
        (
            "memory = 7\n[worker]\nmemory = 5",
            "memory: is given twice: cluster.toml: worker.memory is the same option",
        ),
        ("worker = 5", "cluster.toml: worker: must be a table"),
    ],
)
def test_a_wrong_table_of_a_worker_is_an_error_with_its_place(
    tmp_path: Path, toml: str, message: str
) -> None:
    assert message in complaint(tmp_path, toml)


def test_the_engines_of_a_file_are_read_in_their_order_and_are_no_options(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    toml = '[[serve]]\nengine = "a"\n\n[[serve]]\nengine = "b"\nidle = 600\n'
    assert load(toml, tmp_path=tmp_path) == ClusterServerOptions()
    assert load_serve_tables(file) == [
        (f"{file}: [[serve]] 1", {"engine": "a"}),
        (f"{file}: [[serve]] 2", {"engine": "b", "idle": 600}),
    ]
    assert load_serve_tables(None) == []
    file.write_text("serve = 5\n")
    with pytest.raises(OptionsError, match=r"serve: must be tables, each \[\[serve\]\]"):
        load_serve_tables(file)
