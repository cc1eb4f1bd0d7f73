"""A deadline of a test passes by what the test does, and not by what else the machine does."""

from __future__ import annotations

import re
from pathlib import Path

import patience
import pytest
import trio


@pytest.fixture
def pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the system says how long processes had to wait."""
    path = tmp_path / "cpu"
    monkeypatch.setattr(patience, "_PRESSURE", path)
    starve(path, 0)
    return path


def starve(path: Path, seconds: float) -> None:
    path.write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={round(seconds * 1e6)}\nfull avg10=0.00 total=0\n"
    )


async def test_what_is_in_time_passes_and_what_is_not_is_cancelled(pressure: Path) -> None:
    with patience.fail_after(5):
        await trio.sleep(0.01)
    with pytest.raises(trio.TooSlowError), patience.fail_after(0.02):
        await trio.sleep_forever()
    with pytest.raises(KeyError), patience.fail_after(5):
        raise KeyError


async def test_time_in_which_processes_wait_for_a_core_is_not_counted(pressure: Path) -> None:
    watch = patience.Stopwatch()
    with patience.fail_after(0.05):
        starve(pressure, 100)
        await trio.sleep(0.2)
    assert watch.total >= 0.2
    assert watch.counted < 0.1


async def test_not_everything_is_left_out(pressure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_MOST", 0.1)
    starve(pressure, 0)
    watch = patience.Stopwatch()
    starve(pressure, 1000)
    await trio.sleep(0.2)
    assert watch.counted >= 0.1


async def test_where_nothing_is_known_the_first_seconds_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(patience, "_PRESSURE", tmp_path / "nothing")
    with patience.fail_after(0.01):
        await trio.sleep(0.1)
    monkeypatch.setattr(patience, "_LEAST", 0.1)
    with pytest.raises(trio.TooSlowError), patience.fail_after(0.01):
        await trio.sleep_forever()


def test_no_test_beside_real_clients_and_processes_has_a_short_deadline_of_the_real_clock() -> None:
    tests = Path(__file__).parent.parent
    short = re.compile(r"trio\.fail_after\((0\.\d+|[1-4](\.\d+)?)\)")
    found = [
        f"{path.name}: {match[0]}"
        for folder in ("accounts", "admin", "clients", "end_to_end", "http1", "hypercorn_server")
        for path in (tests / folder).glob("test_*.py")
        if (match := short.search(path.read_text(encoding="utf-8"))) and path != Path(__file__)
    ]
    assert found == [], "write patience.fail_after: time in which other programs compute is not counted"
