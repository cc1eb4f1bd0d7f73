"""Models of a model hub, with the real library, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hub_server import COMMIT, HubServer, serve_hub

from trio_cluster.engines import _hub, llama, parse_serve
from trio_cluster.engines._hub import HubReference, download
from trio_cluster.errors import ClusterError, OptionsError

#: Longer than the 10 MiB in which the library writes to the disk.
CONTENT = bytes(range(256)) * 45_000
CHUNK = 10 * 1024 * 1024
REPO = "owner/model-GGUF"

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None,
    reason="needs huggingface_hub; the extra hf brings it",
)
pytestmark = [pytest.mark.processes, pytest.mark.engines]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one model, and an empty cache."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        served.files[REPO] = {"README.md": b"", "model-Q4_K_M.gguf": CONTENT, "model-Q8_0.gguf": b"other"}
        yield served


def blobs(tmp_path: Path) -> list[str]:
    """Return the kinds of files with contents in the cache."""
    folder = tmp_path / "hf" / "hub" / "models--owner--model-GGUF" / "blobs"
    return sorted(path.suffix for path in folder.iterdir()) if folder.exists() else []


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trio_cluster.engines"]


@needs_library
async def test_a_model_is_downloaded_once_and_then_found(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    path = await download(HubReference(REPO))
    assert (path.name, path.read_bytes()) == ("model-Q4_K_M.gguf", CONTENT)
    # It is where the library and other programs look for it.
    assert path.is_relative_to(tmp_path / "hf" / "hub" / "models--owner--model-GGUF" / "snapshots" / COMMIT)
    assert blobs(tmp_path) == [""]
    assert messages(caplog) == ["downloading", "checking what was downloaded"]
    assert await download(HubReference(REPO)) == path
    assert len(hub.ranges) == 1
    assert len(messages(caplog)) == 2


@needs_library
async def test_all_parts_of_a_model_are_downloaded_beside_each_other(hub: HubServer) -> None:
    hub.files[REPO] = {f"Q8/m-0000{number}-of-00003.gguf": b"%d" % number for number in (3, 2, 1)}
    path = await download(HubReference(REPO, "main", "Q8"))
    assert path.name == "m-00001-of-00003.gguf"
    assert [file.read_bytes() for file in sorted(path.parent.iterdir())] == [b"1", b"2", b"3"]


@needs_library
async def test_a_download_that_was_cancelled_goes_on_where_it_has_ended(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    hub.hold_after = CHUNK + 100_000
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download, HubReference(REPO))
            await trio.to_thread.run_sync(hub.held.wait, 30)
            nursery.cancel_scope.cancel()
    hub.released.set()
    assert blobs(tmp_path) == [".partial"]
    (partial,) = (tmp_path / "hf" / "hub" / "models--owner--model-GGUF" / "blobs").iterdir()
    have = partial.stat().st_size
    assert have in (0, CHUNK)
    if have == 0:
        # The process was ended before it had written what it had: pretend that it had.
        partial.write_bytes(CONTENT[:CHUNK])
        have = CHUNK
    hub.hold_after = None
    assert (await download(HubReference(REPO))).read_bytes() == CONTENT
    assert hub.ranges[-1] == f"bytes={have}-"
    assert blobs(tmp_path) == [""]
    assert vars(caplog.records[-2])["fields"]["there_already"] == f"{have / len(CONTENT):.0%}"


@needs_library
async def test_a_connection_that_breaks_is_made_up_for(hub: HubServer, tmp_path: Path) -> None:
    hub.break_after = CHUNK + 100_000
    assert (await download(HubReference(REPO))).read_bytes() == CONTENT
    assert hub.ranges == [None, f"bytes={CHUNK}-"]


@needs_library
async def test_a_wrong_content_is_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.wrong = True
    with pytest.raises(ClusterError, match="does not have the content that the hub says; it was removed"):
        await download(HubReference(REPO))
    assert blobs(tmp_path) == []
    hub.wrong = False
    assert (await download(HubReference(REPO))).read_bytes() == CONTENT


@needs_library
async def test_without_a_network_what_is_there_is_used(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = await download(HubReference(REPO))
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert await download(HubReference(REPO, "main", "Q4_K_M")) == path
    assert await download(HubReference(REPO, COMMIT)) == path
    assert len(hub.requests) == asked
    assert [vars(record)["fields"]["why"] for record in caplog.records] == ["HF_HUB_OFFLINE is set"] * 2
    with pytest.raises(
        ClusterError, match="of what was downloaded before, no file is meant by 'Q8_0': model-Q4"
    ):
        await download(HubReference(REPO, "main", "Q8_0"))
    with pytest.raises(
        ClusterError, match=r"HF_HUB_OFFLINE is set\), and of what was downloaded before, it has no"
    ):
        await download(HubReference("owner/another"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.status = 503
    assert await download(HubReference(REPO)) == path
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert await download(HubReference(REPO)) == path


@needs_library
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (
            404,
            "RepoNotFound",
            "there is no such repository, or it is private and HF_TOKEN has no access to it",
        ),
        (403, "GatedRepo", "its owner must grant access; accept its terms on its page, and set HF_TOKEN"),
        (404, "RevisionNotFound", "there is no revision 'main'"),
        (500, "", "the hub cannot be asked ("),
    ],
)
async def test_a_refusal_is_explained_in_one_line(
    status: int, code: str, expected: str, hub: HubServer
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(ClusterError) as caught:
        await download(HubReference(REPO))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"hf:{REPO}: ")
    assert expected in str(caught.value)


@needs_library
async def test_the_token_of_the_library_is_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await download(HubReference(REPO))
    assert set(hub.keys) == {"Bearer hf_secret"}


class ThirdLine(logging.Handler):
    """Sets an event with the third line of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = trio.Event()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        if self.count == 3:
            self.heard.set()


@needs_library
async def test_progress_is_logged_now_and_then(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    monkeypatch.setattr(_hub, "_LOG_INTERVAL", 0.05)
    hub.hold_after = len(CONTENT) // 2
    listener = ThirdLine()
    logging.getLogger("trio_cluster.engines").addHandler(listener)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(download, HubReference(REPO))
            with trio.fail_after(30):
                await listener.heard.wait()
            hub.released.set()
    finally:
        logging.getLogger("trio_cluster.engines").removeHandler(listener)
    lines = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "downloading"]
    assert lines[0] == {"model": f"hf:{REPO}", "file": "model-Q4_K_M.gguf", "megabytes": 12}
    assert lines[1].keys() >= {"file", "done", "megabytes_per_second"}


@needs_library
def test_a_download_ends_with_its_parent(hub: HubServer, tmp_path: Path) -> None:
    hub.hold_after = 1000
    program = (
        "import trio; from trio_cluster.engines._hub import HubReference, download;"
        f"trio.run(download, HubReference({REPO!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as popen:
        assert hub.held.wait(30)
        popen.send_signal(signal.SIGKILL)
        popen.wait()
        assert popen.stderr is not None
        # The child has the other end of the pipe, and closes it when it ends.
        assert popen.stderr.read() == b""
    assert blobs(tmp_path) == [".partial"]


@needs_library
async def test_the_engine_serves_what_was_downloaded(hub: HubServer) -> None:
    spec = parse_serve(f"llama:hf:{REPO}:Q8_0") if importlib.util.find_spec("xllamacpp") else None
    argument = f"hf:{REPO}:Q8_0" if spec is None else spec.argument
    path = Path(await llama.engine.prepare(argument, {}))
    assert path.stem == "model-Q8_0"
    assert path.read_bytes() == b"other"  # noqa: ASYNC240


async def test_a_process_that_ends_without_a_word_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text('import sys; print(\'{"event": "have", "path": "/x"}\'); sys.exit(\'no memory\')')
    monkeypatch.setattr(_hub, "_PROGRAM", program)
    with pytest.raises(ClusterError, match=r"^hf:a/b: no memory$"):
        await download(HubReference("a/b"))


def test_without_the_library_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            None if name == "huggingface_hub" else object() if name == "xllamacpp" else real(name)
        ),
    )
    with pytest.raises(ClusterError, match=r"this needs huggingface_hub, .*pip install .*\[hf\]"):
        parse_serve("llama:hf:owner/model-GGUF:Q4_K_M,ctx=1024")
    with pytest.raises(OptionsError, match="expected hf:REPO or hf:REPO:FILE"):
        parse_serve("llama:hf:a/b/c")
