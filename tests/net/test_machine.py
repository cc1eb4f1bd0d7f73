"""What makes connections doubtful: a machine that was suspended, and one whose addresses have changed."""

from __future__ import annotations

import os
import random
import socket
import struct
import sys

import pytest
import trio

from trio_cluster.net.machine import AddressBook, SuspensionClock, ThisMachine

NEW, REMOVED, DONE = 20, 21, 3
LOOPBACK, LINK, GLOBAL = 254, 253, 0
TENTATIVE, PERMANENT = 0x40, 0x80


class Clocks:
    """Two clocks, one of which stands still when the machine is suspended."""

    def __init__(self) -> None:
        self.awake = 1000.0
        self.always = 5000.0

    def run(self, seconds: float) -> None:
        self.awake += seconds
        self.always += seconds

    def clock(self) -> SuspensionClock:
        return SuspensionClock(lambda: self.awake, lambda: self.always)


def test_a_suspension_is_told_once() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.run(5)
    assert clock.suspended_for() == 0
    clocks.always += 300
    clocks.run(5)
    assert clock.suspended_for() == 300
    clocks.run(5)
    assert clock.suspended_for() == 0


def test_what_is_less_than_a_second_is_the_time_between_two_readings() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    for _ in range(10):
        clocks.always += 0.5
        assert clock.suspended_for() == 0


def test_a_wall_clock_that_is_set_back_is_no_suspension() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.always -= 3600
    assert clock.suspended_for() == 0
    clocks.always += 2
    assert clock.suspended_for() == 2


def test_the_real_clocks_agree_while_the_machine_runs() -> None:
    machine = ThisMachine()
    assert [machine.suspended_for() for _ in range(3)] == [0, 0, 0]


def message(kind: int, body: bytes = b"") -> bytes:
    """Return a message of the kernel."""
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)


def address(
    kind: int, text: str, *, index: int = 2, scope: int = GLOBAL, flags: int = PERMANENT, wide: bool = True
) -> bytes:
    """Return what the kernel says of an address."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    body = struct.pack("=BBBBI", family, 24, flags & 0xFF, scope, index)
    body += struct.pack("=HH", 4 + len(packed), 1) + packed
    # A label, which has no use here, and whose size is no multiple of four.
    body += struct.pack("=HH", 4 + 5, 3) + b"eth0\0" + bytes(3)
    if wide:
        body += struct.pack("=HHI", 8, 8, flags)
    return message(kind, body)


def complete(*messages: bytes) -> AddressBook:
    """Return a book that knows these."""
    book = AddressBook()
    assert not book.receive(b"".join(messages))
    assert not book.receive(message(DONE, bytes(4)))
    return book


def test_what_is_there_at_first_is_no_change() -> None:
    book = complete(address(NEW, "10.0.0.5"), address(NEW, "2001:db8::5"))
    # As routers advertise it again and again.
    assert not book.receive(address(NEW, "2001:db8::5"))
    assert not book.receive(address(REMOVED, "10.0.0.6"))


def test_an_address_that_comes_or_goes_is_a_change() -> None:
    book = complete(address(NEW, "10.0.0.5"))
    assert book.receive(address(NEW, "10.0.0.6"))
    assert book.receive(address(REMOVED, "10.0.0.5"))
    assert not book.receive(address(REMOVED, "10.0.0.5"))
    # The same one on another card.
    assert book.receive(address(NEW, "10.0.0.6", index=3))
    assert book.receive(address(REMOVED, "10.0.0.6") + address(NEW, "10.0.0.6"))


@pytest.mark.parametrize("wide", [False, True])
def test_an_address_counts_when_it_may_be_used(wide: bool) -> None:
    book = complete()
    assert not book.receive(address(NEW, "2001:db8::5", flags=TENTATIVE, wide=wide))
    assert book.receive(address(NEW, "2001:db8::5", wide=wide))
    assert not book.receive(address(NEW, "2001:db8::5", wide=wide))


def test_addresses_that_reach_no_other_network_do_not_count() -> None:
    book = complete()
    assert not book.receive(address(NEW, "fe80::1", scope=LINK))
    assert not book.receive(address(NEW, "127.0.0.2", scope=LOOPBACK))
    assert not book.receive(address(REMOVED, "fe80::1", scope=LINK))


def test_after_a_gap_all_addresses_are_asked_for_once_more() -> None:
    book = complete(address(NEW, "10.0.0.5"))
    book.forget()
    assert not book.receive(address(NEW, "10.0.0.6") + message(DONE, bytes(4)))
    assert book.receive(address(NEW, "10.0.0.5"))


def test_the_kernel_is_not_trusted_to_send_whole_messages() -> None:
    drawn = random.Random(1)
    whole = address(NEW, "10.0.0.5") + address(REMOVED, "2001:db8::5") + message(DONE)
    for _ in range(2000):
        data = bytearray(whole[: drawn.randrange(len(whole) + 1)])
        for _ in range(drawn.randrange(4)):
            if data:
                data[drawn.randrange(len(data))] = drawn.randrange(256)
        AddressBook().receive(bytes(data))


@pytest.mark.skipif(sys.platform != "linux", reason="addresses are reported on Linux only")
async def test_the_kernel_tells_its_addresses(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    told = trio.Event()
    known: list[int] = []
    receive = AddressBook.receive

    def record(self: AddressBook, data: bytes) -> bool:
        changed = receive(self, data)
        known.append(len(data))
        told.set()
        return changed

    monkeypatch.setattr(AddressBook, "receive", record)
    changes: list[None] = []
    nursery.start_soon(ThisMachine().watch_addresses, lambda: changes.append(None))
    with trio.fail_after(5):
        await told.wait()
    assert known


async def test_without_netlink_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(93, os.strerror(93))

    monkeypatch.setattr(socket, "socket", refuse)
    await ThisMachine().watch_addresses(lambda: None)
