"""The conversation of a master and the process that takes its place, without IO: a failure at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import attrs
import pytest

from trio_cluster.cluster.take_over import (
    VERSION,
    Begin,
    Change,
    Hello,
    Linked,
    Message,
    Offer,
    Predecessor,
    PredecessorState,
    Ready,
    Refused,
    Serving,
    Successor,
    SuccessorState,
    Unexpected,
    Yours,
    decode,
    encode,
)

ALL: Final[tuple[Message, ...]] = (
    Hello(VERSION, 7),
    Offer(8, 1, 2),
    Ready(),
    Begin({"w": ["m"]}),
    Linked(),
    Yours(),
    Serving(),
    Refused("no"),
    Change("[]"),
)


@attrs.define
class Both:
    """Two processes, and what each has said that the other has not received."""

    old: Predecessor = attrs.field(factory=Predecessor)
    new: Successor = attrs.field(factory=Successor)
    to_old: list[Message] = attrs.field(factory=list)
    to_new: list[Message] = attrs.field(factory=list)
    old_lives: bool = True
    new_lives: bool = True

    def deliver_to_old(self) -> None:
        self.old.receive(self.to_old.pop(0))
        answers: dict[PredecessorState, Message] = {
            PredecessorState.PREPARING: Offer(1, 1, 1),
            PredecessorState.LINKING: Begin({}),
            PredecessorState.LEAVING: Yours(),
        }
        if self.old.state in answers:
            self.to_new.append(answers[self.old.state])

    def deliver_to_new(self) -> None:
        self.new.receive(self.to_new.pop(0))
        if self.new.state is SuccessorState.SERVING:
            self.to_old.append(Serving())

    def say_hello(self) -> None:
        self.to_old.append(Hello(VERSION, 1))

    def ready(self) -> None:
        self.new.ready()
        if self.new.state is SuccessorState.READY:
            self.to_old.append(Ready())

    def linked(self) -> None:
        self.new.linked()
        self.to_old.append(Linked())

    def kill_old(self) -> None:
        """The old process ends; what it has said arrives nevertheless, and then the end."""
        self.old_lives = False
        while self.to_new and self.new_lives:
            self.deliver_to_new()
        self.new.lost()

    def kill_new(self) -> None:
        self.new_lives = False
        while self.to_old and not self.old.is_over:
            self.deliver_to_old()
        self.old.fail("it has ended")

    def finish_new(self) -> None:
        """Let the new process do all that it would still do alone."""
        self.new.ready()
        self.new.linked()

    @property
    def serving(self) -> list[str]:
        """Which of the living processes accept clients."""
        lives = [("old", self.old_lives and self.old.accepts_clients)]
        lives.append(("new", self.new_lives and self.new.accepts_clients))
        return [name for name, serves in lives if serves]

    @property
    def taking_workers(self) -> list[str]:
        lives = [("old", self.old_lives and self.old.accepts_workers)]
        lives.append(("new", self.new_lives and self.new.accepts_workers))
        return [name for name, serves in lives if serves]


STEPS: Final[tuple[Callable[[Both], None], ...]] = (
    Both.say_hello,
    Both.deliver_to_old,
    Both.deliver_to_new,
    Both.ready,
    Both.deliver_to_old,
    Both.deliver_to_new,
    Both.linked,
    Both.deliver_to_old,
    Both.deliver_to_new,
    Both.deliver_to_old,
)


def after(steps: int) -> Both:
    both = Both()
    for step in STEPS[:steps]:
        step(both)
    return both


def test_at_each_step_one_process_serves_or_the_other_has_been_told_to() -> None:
    seen = []
    for steps in range(len(STEPS) + 1):
        both = after(steps)
        assert both.serving in (["old"], ["new"]) or both.to_new == [Yours()]
        assert both.taking_workers in (["old"], ["new"]) or isinstance(both.to_new[0], Begin)
        seen.append("".join(both.serving))
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert both.old.state is PredecessorState.REPLACED


@pytest.mark.parametrize("steps", range(len(STEPS) + 1))
def test_the_old_process_dies_at_any_step(steps: int) -> None:
    both = after(steps)
    both.kill_old()
    both.finish_new()
    # Before it has the sockets it cannot serve, and says so.
    has_sockets = both.new.state is not SuccessorState.FAILED
    assert has_sockets == (steps >= 2)
    assert both.serving == both.taking_workers == (["new"] if has_sockets else [])


@pytest.mark.parametrize("steps", range(len(STEPS) + 1))
def test_the_new_process_dies_at_any_step(steps: int) -> None:
    both = after(steps)
    both.kill_new()
    # What it said last counts: it has served then, and has died as a master.
    replaced = steps >= 9
    assert both.serving == both.taking_workers == ([] if replaced else ["old"])
    assert both.old.is_over
    assert bool(both.old.why) != replaced


@pytest.mark.parametrize("steps", range(len(STEPS)))
def test_the_new_process_hangs_at_any_step_and_wakes_up_later(steps: int) -> None:
    both = after(steps)
    if both.to_old:
        # It has spoken in time.
        both.deliver_to_old()
    if both.old.is_over:
        return
    assert 0 < both.old.wait <= 300
    both.old.fail("it took too long")
    both.to_new.append(Refused(both.old.why))
    assert both.serving[0] == "old"
    while both.to_new:
        both.new.receive(both.to_new.pop(0))
    both.finish_new()
    assert both.serving == both.taking_workers == ["old"]
    assert both.new.state is SuccessorState.FAILED
    assert both.new.why == "it took too long"


@pytest.mark.parametrize("steps", range(len(STEPS)))
def test_the_old_process_hangs_and_the_new_one_gives_way(steps: int) -> None:
    both = after(steps)
    waits = both.new.wait
    if both.new.state in (SuccessorState.ASKING, SuccessorState.READY, SuccessorState.ARRIVING):
        assert 0 < waits <= 30
        both.new.fail("no answer")
        both.new_lives = False
        both.old.fail("it has ended")
        assert both.serving == ["old"]
    else:
        # It waits for nothing that the old one has to do.
        assert waits == float("inf")


def wrong(state: str) -> Iterator[Message]:
    right = {
        "WAITING": Hello,
        "PREPARING": Ready,
        "LINKING": Linked,
        "LEAVING": Serving,
    }
    return (message for message in ALL if type(message) is not right[state])


@pytest.mark.parametrize("steps", [0, 2, 5, 8])
def test_what_must_not_be_said_now_changes_nothing_at_the_old_process(steps: int) -> None:
    both = after(steps)
    before = both.old.state
    for message in wrong(before):
        with pytest.raises(Unexpected, match=before):
            both.old.receive(message)
        assert both.old.state is before


@pytest.mark.parametrize("steps", range(len(STEPS)))
def test_what_must_not_be_said_now_changes_nothing_at_the_new_process(steps: int) -> None:
    right = {
        SuccessorState.ASKING: (Offer,),
        SuccessorState.PREPARING: (),
        SuccessorState.READY: (Begin,),
        SuccessorState.LINKING: (Change,),
        SuccessorState.ARRIVING: (Yours, Change),
        SuccessorState.SERVING: (Change,),
    }
    both = after(steps)
    before = both.new.state
    for message in ALL:
        if type(message) in (Refused, *right[before]):
            continue
        with pytest.raises(Unexpected, match=before):
            both.new.receive(message)
        assert both.new.state is before


def test_another_version_is_refused_with_both_numbers() -> None:
    old = Predecessor()
    with pytest.raises(Unexpected, match=f"version {VERSION + 1} .* in {VERSION}"):
        old.receive(Hello(VERSION + 1, 1))
    assert old.accepts_clients


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_messages_are_lines(message: Message) -> None:
    line = encode(message)
    assert b"\n" not in line
    assert decode(line) == message


@pytest.mark.parametrize(
    "line", [b"", b"\xff", b"{", b"[]", b"{}", b'{"type":"x"}', b'{"type":"hello","pid":1}']
)
def test_garbage_is_no_message(line: bytes) -> None:
    with pytest.raises(Unexpected):
        decode(line)


def test_a_failure_is_final_and_the_first_one_counts() -> None:
    both = after(5)
    both.old.fail("first")
    both.old.fail("second")
    assert (both.old.state, both.old.why) == (PredecessorState.KEPT, "first")
    both.new.fail("first")
    both.new.fail("second")
    both.new.receive(Yours())
    both.new.lost()
    assert (both.new.state, both.new.why, both.new.accepts_clients) == (SuccessorState.FAILED, "first", False)
