"""Invitations: a token works once, and what is kept about it is enough to say why it does not."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from trio_cluster.core.state_dir import StateDir, StateDirError
from trio_cluster.security import invitations
from trio_cluster.security.invitations import JoinRefused, Members, Token, TokenError
from trio_cluster.security.joining import JoinFailed, join as join_cluster

NOW = 1_800_000_000.0
ADDRESSES = ["gpu.lan:8080", "[fd00::1]:8080"]


@pytest.fixture
def members(tmp_path: Path) -> Members:
    return Members(StateDir(tmp_path))


def invite(members: Members, name: str | None = None) -> Token:
    return members.invite(ADDRESSES, "ab" * 32, name=name, expires=NOW + 3600, now=NOW)


def join(members: Members, token: Token, key: str, serial: str, name: str = "w1") -> str:
    given_name = members.check_invitation(token.secret, key, name, NOW)
    members.record(given_name, key, serial, token.secret)
    return given_name


@given(
    addresses=st.lists(st.text(min_size=1), min_size=1, max_size=4),
    authority=st.text(),
    secret=st.text(min_size=1),
)
def test_a_token_is_one_word_that_can_be_read_again(
    addresses: list[str], authority: str, secret: str
) -> None:
    token = Token(tuple(addresses), authority, secret)
    word = token.encode()
    assert word.isascii()
    assert not any(character.isspace() for character in word)
    assert Token.decode(f" {word}\n") == token


def test_a_part_of_a_token_is_not_taken_for_a_whole_one(members: Members) -> None:
    word = invite(members).encode()
    for cut in range(len(word)):
        with pytest.raises(TokenError):
            Token.decode(word[:cut])
    for place in range(4, len(word)):
        changed = word[:place] + ("A" if word[place] != "A" else "B") + word[place + 1 :]
        # The last letter may have bits that are not used.
        try:
            assert Token.decode(changed) == Token.decode(word)
        except TokenError:
            continue
    with pytest.raises(TokenError, match="no invitation; one begins with tcj-"):
        Token.decode("tc-abcdef")


@pytest.mark.parametrize(
    "content", ['[5, "ab", "cd"]', '["gpu:1", "ab", "cd"]', '[["gpu:1"], 5, 6]', "[[7], 5]", "{}"]
)
def test_what_is_well_packed_but_no_token_is_refused(content: str) -> None:
    packed = hashlib.sha256(content.encode()).digest()[:4] + content.encode()
    with pytest.raises(TokenError):
        Token.decode("tcj-" + base64.urlsafe_b64encode(packed).decode())


def test_a_token_with_an_address_that_is_none_is_a_failure_to_join(tmp_path: Path) -> None:
    with pytest.raises(JoinFailed, match="expected HOST:PORT, got 'gpu'"):
        join_cluster(StateDir(tmp_path), Token(("gpu",), "ab", "cd").encode(), "w1")


def test_the_secret_is_neither_kept_nor_shown(members: Members, tmp_path: Path) -> None:
    token = invite(members)
    assert token.secret not in (tmp_path / "members.json").read_text()
    assert token.secret not in repr(token)


def test_a_token_works_once_and_for_the_same_key_again(members: Members, tmp_path: Path) -> None:
    token = invite(members)
    assert join(members, token, "key", "1") == "w1"
    # The worker was killed before it had kept the answer. It asks again, also after the master was restarted.
    assert join(members, token, "key", "2") == "w1"
    again = Members(StateDir(tmp_path))
    assert join(again, token, "key", "3") == "w1"
    with pytest.raises(JoinRefused, match="was used already"):
        again.check_invitation(token.secret, "another key", "w2", NOW)


def test_why_a_token_is_refused_is_said(members: Members) -> None:
    token, named = invite(members), invite(members, "gpu")
    with pytest.raises(JoinRefused, match="has expired"):
        members.check_invitation(token.secret, "key", "w1", NOW + 3600)
    with pytest.raises(JoinRefused, match="not known to this master"):
        members.check_invitation("guess", "key", "w1", NOW)
    assert members.revoke("gpu")
    with pytest.raises(JoinRefused, match="was revoked"):
        members.check_invitation(named.secret, "key", "w1", NOW)


def test_a_name_belongs_to_one_key_until_it_is_revoked(members: Members) -> None:
    first, second = invite(members, "gpu"), invite(members)
    assert join(members, first, "key", "1", "ignored") == "gpu"
    with pytest.raises(JoinRefused, match="a worker 'gpu' already"):
        members.check_invitation(second.secret, "another key", "gpu", NOW)
    assert members.revoke("gpu")
    assert join(members, second, "another key", "2", "gpu") == "gpu"
    assert (members.is_revoked("1"), members.is_revoked("2")) == (True, False)


def test_what_was_revoked_stays_so_after_a_restart_and_is_not_renewed(
    members: Members, tmp_path: Path
) -> None:
    join(members, invite(members), "key", "1")
    members.check_renewal("w1", "1", "key")
    with pytest.raises(JoinRefused, match="has another key"):
        members.check_renewal("w1", "1", "stolen")
    members.record("w1", "key", "2")
    assert members.revoke("w1")
    assert not members.revoke("nobody")
    again = Members(StateDir(tmp_path))
    assert again.is_revoked("1")
    assert again.is_revoked("2")
    with pytest.raises(JoinRefused, match="was revoked"):
        again.check_renewal("w1", "2", "key")


@pytest.mark.parametrize("name", [None, "w1"])
def test_a_worker_that_was_revoked_does_not_join_again_with_its_token(
    members: Members, tmp_path: Path, name: str | None
) -> None:
    token = invite(members, name)
    join(members, token, "key", "1")
    assert members.revoke("w1")
    for each in (members, Members(StateDir(tmp_path))):
        for wanted in ("w1", "w2"):
            with pytest.raises(JoinRefused, match="was revoked"):
                each.check_invitation(token.secret, "key", wanted, NOW)
    # Nor with the same key by another invitation, nor when another worker has got its name.
    with pytest.raises(JoinRefused, match="'w1' was revoked"):
        members.check_invitation(invite(members, name).secret, "key", "w1", NOW)
    join(members, invite(members, name), "another key", "2")
    with pytest.raises(JoinRefused, match="was revoked"):
        members.check_invitation(token.secret, "key", "w1", NOW)


def test_a_worker_that_joins_again_with_its_token_has_the_same_name(members: Members) -> None:
    token = invite(members)
    join(members, token, "key", "1", "w1")
    assert join(members, token, "key", "2", "w2") == "w1"
    members.revoke("w1")
    assert members.is_revoked("2")


def test_invitations_are_bounded(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invitations, "MAX_INVITATIONS", 3)
    for _ in range(3):
        invite(members)
    with pytest.raises(JoinRefused, match="3 invitations already"):
        invite(members)
    # Those that have ended long ago make room.
    late = NOW + 3600 + 31 * 86400
    members.invite(ADDRESSES, "ab", name=None, expires=late + 1, now=late)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"version": 1}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "members.json").write_bytes(damage)
    with pytest.raises(StateDirError, match=r"members\.json: it is damaged"):
        Members(StateDir(tmp_path))
    (tmp_path / "members.json").write_bytes(b'{"version": 2}')
    with pytest.raises(StateDirError, match="later version"):
        Members(StateDir(tmp_path))


def test_the_certificates_of_a_worker_are_bounded_and_all_are_revoked(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invitations, "MAX_CERTIFICATES", 3)
    join(members, invite(members), "key", "0")
    for number in (1, 2):
        members.record("w1", "key", str(number))
    with pytest.raises(JoinRefused, match="has had 3 certificates"):
        members.record("w1", "key", "3")
    members.revoke("w1")
    assert [members.is_revoked(str(number)) for number in range(3)] == [True] * 3


def test_nothing_is_computed_for_a_secret_that_is_not_known(members: Members) -> None:
    members.check_secret(invite(members).secret)
    with pytest.raises(JoinRefused, match="not known to this master"):
        members.check_secret("guess")
