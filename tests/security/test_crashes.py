"""A process that is killed at any step of any write leaves what was kept before, or what was to be kept."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trio_cluster.core.state_dir import StateDir
from trio_cluster.security.authority import Authority
from trio_cluster.security.invitations import Members
from trio_cluster.security.membership import Membership, begin_joining, load_membership, save_membership

NOW = datetime.datetime.now(datetime.UTC)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after it may change a file."""


def steps(place: Path, act: Callable[[StateDir], object]) -> Iterator[None]:
    """Do something again and again, and die before the first system call that changes a file, before the second...

    Yields after each death. Ends when it was done without dying.
    """
    number = 0
    while True:
        number += 1
        left = number
        dead = False

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left, dead
            changes = event in ("os.rename", "os.remove", "os.mkdir") or (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_CREAT)
            )
            if not changes or not str(arguments[0]).startswith(str(place)):
                return
            if dead:
                # A killed process cleans nothing up.
                raise Killed
            left -= 1
            if left == 0:
                dead = True
                raise Killed

        _hooks.append(before)
        try:
            act(StateDir(place))
        except Killed:
            _hooks.remove(before)
            yield
        else:
            _hooks.remove(before)
            return


_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for hook in _hooks:
        hook(event, arguments)


# It cannot be taken away again; without hooks it does nothing.
sys.addaudithook(_audit)


def test_an_authority_that_is_made_or_replaced_is_whole_or_as_before(tmp_path: Path) -> None:
    deaths = 0
    for _ in steps(tmp_path, lambda state: Authority(state, NOW)):
        deaths += 1
        Authority(StateDir(tmp_path), NOW)
        for path in tmp_path.iterdir():
            path.unlink()
    assert deaths >= 4
    before = Authority(StateDir(tmp_path), NOW)
    known = {before.fingerprint}

    def rotate(state: StateDir) -> None:
        authority = Authority(state, NOW)
        known.add(authority.fingerprint)
        authority.rotate(NOW)
        known.add(authority.fingerprint)

    for _ in steps(tmp_path, rotate):
        after = Authority(StateDir(tmp_path), NOW)
        assert after.trusted == (tmp_path / "ca.pem").read_text()
        known.add(after.fingerprint)
        after.server_certificate([], NOW)
        # Whatever was in force when it was invited, a worker that knew the first authority is still accepted.
        assert before.trusted in after.trusted


def test_what_a_master_has_granted_is_kept_before_it_is_answered(tmp_path: Path) -> None:
    members = Members(StateDir(tmp_path))
    token = members.invite(["m:1"], "ab", name="w1", expires=2.0, now=1.0)

    def grant(state: StateDir) -> None:
        kept = Members(state)
        name = kept.check_invitation(token.secret, "key", "w1", 1.0)
        kept.record(name, "key", "77", token.secret)

    for _ in steps(tmp_path, grant):
        after = Members(StateDir(tmp_path))
        # Either nothing has happened, or this key has joined; no other may join in its place then.
        assert after.check_invitation(token.secret, "key", "w1", 1.0) == "w1"
    grant(StateDir(tmp_path))
    assert Members(StateDir(tmp_path)).revoke("w1")
    assert Members(StateDir(tmp_path)).is_revoked("77")


def test_a_worker_that_is_killed_while_it_joins_joins_with_the_same_key_again(tmp_path: Path) -> None:
    keys: set[str] = set()
    for _ in steps(tmp_path, lambda state: begin_joining(state, "token", "w1")):
        keys.add(begin_joining(StateDir(tmp_path), "token", "w1")[0])
        keys.add(begin_joining(StateDir(tmp_path), "token", "w1")[0])
        assert len(keys) == 1
    authority = Authority(StateDir(tmp_path / "master"), NOW)
    key, request = begin_joining(StateDir(tmp_path), "token", "w1")
    certificate, _ = authority.worker_certificate(request, "w1", NOW)
    membership = Membership("w1", ("m:1",), authority.trusted, certificate, key, "digest")
    found: list[bool] = []
    for _ in steps(tmp_path, lambda state: save_membership(state, membership)):
        kept = load_membership(StateDir(tmp_path))
        found.append(kept is not None)
        if kept is not None:
            assert kept[0] == membership
            assert kept[1].read_text() == key + certificate
        else:
            # It asks again with the same key, and is answered again.
            assert begin_joining(StateDir(tmp_path), "token", "w1")[0] == key
    assert True in found
    assert False in found


@pytest.mark.parametrize("path", ["membership.json", "worker.pem"])
def test_what_a_worker_keeps_is_private(tmp_path: Path, path: str) -> None:
    authority = Authority(StateDir(tmp_path / "master"), NOW)
    key, request = begin_joining(StateDir(tmp_path), "token", "w1")
    certificate, _ = authority.worker_certificate(request, "w1", NOW)
    save_membership(StateDir(tmp_path), Membership("w1", ("m:1",), authority.trusted, certificate, key, "d"))
    assert load_membership(StateDir(tmp_path)) is not None
    assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "joining.json").exists()
