"""A queue that is fair between principals: deficit round robin, without I/O, tasks or a clock.

Theory of operation
===================

Each principal that waits has a *flow*: its requests, in the order in which they came. The flows take turns. At each
turn, a flow is granted :data:`QUANTUM` times its weight, in units of cost, and its first requests are taken as long as
their costs are covered by what it has been granted and has not used (its *deficit*). A flow that has nothing waiting
any more leaves, and takes nothing along. (M. Shreedhar and G. Varghese, Efficient Fair Queuing using Deficit Round
Robin, 1995.)

*Cost* is what a request will probably take, in tokens; see :func:`estimated_cost`. So a principal whose requests are
long gets fewer of them served, not more of the node.

*Settling.* When a request has ended and its usage is known, its flow, if anything waits in it, is charged for the
tokens that were more than estimated, or gets back those that were less (:meth:`FairQueue.settle`). So a principal gains
little by requests that do not say how long their answers may be.

*Weight.* A flow's share of what is served is its weight divided by the weights of all that wait. Priority multiplies
the weight (:data:`PRIORITY_FACTORS`). It is not a strict order, which would starve principals of low priority for as
long as others are busy.

*The bound on waiting.* Let a request wait as part of a flow of weight ``w``, and let ``L`` be its cost, together with
the costs of the requests of its own flow that are before it. Until it is taken, the requests that are taken of another
flow, with weight ``v``, cost at most::

    L * v / w  +  2 * QUANTUM * v  +  the largest cost of one request of that flow

The first term is the other flow's share of the time; the rest is one request, and two quanta. This holds whatever the
others do: come later, leave, come back, or send any number of requests. What is settled meanwhile counts as cost: for
the other flow with its sign, and in ``L`` if it is owed.

*One principal* is served in the order in which its requests came, which is what the queue does for a node without keys.

*Skipped rounds.* If a request costs many quanta, most turns would only add to deficits. These rounds are not walked
through: the deficits get what the rounds would have granted, in one step. So taking a request takes time proportional
to the number of flows, and not to the costs.

*Full queues.* The number of requests that wait is bounded, and one principal alone may use all of it. If another one
needs room then, the latest request of the flow with the most requests, for its weight, is given up for it. So a
principal that fills the queue keeps no other out of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import Final, Generic, TypeVar

import attrs

from .principal import Principal, Priority
from .request import Request

__all__ = [
    "DEFAULT_ANSWER",
    "LARGEST_PART",
    "PRIORITY_FACTORS",
    "QUANTUM",
    "FairQueue",
    "QueueFull",
    "Waiting",
    "estimated_cost",
    "share_of",
]

#: Units of cost, which are tokens, that a flow of weight 1 is granted at each turn: less than most requests have, so
#: that equal flows take turns with single requests.
QUANTUM: Final = 64

#: By what a priority multiplies the weight.
PRIORITY_FACTORS: Final[dict[Priority, float]] = {"high": 4.0, "normal": 1.0, "low": 0.25}

#: Weights out of this range count as the nearest one in it.
_LEAST_WEIGHT: Final = 0.001
_MOST_WEIGHT: Final = 1000.0

#: Bytes of a request for which one token is estimated.
_BYTES_PER_TOKEN: Final = 4
#: Tokens that are estimated for an answer of which the request does not say how long it may be.
DEFAULT_ANSWER: Final = 512
#: Kinds whose answers have no tokens.
_PROMPT_ONLY: Final = frozenset({"embedding", "rerank", "moderation"})
#: Tokens that are estimated at most for the prompt, and for the answer. The bytes of an image or a recording are no
#: text, and the largest request is part of the bound on waiting.
LARGEST_PART: Final = 16_384

#: Units of cost that a flow can owe.
_MOST_DEBT: Final = 2 * LARGEST_PART

T = TypeVar("T")


def share_of(principal: Principal) -> float:
    """Return the weight of a principal's flow: its weight, and what its priority makes of it."""
    weight = principal.weight
    if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        weight = _MOST_WEIGHT if weight > _MOST_WEIGHT else _LEAST_WEIGHT
    return weight * PRIORITY_FACTORS[principal.priority]


def estimated_cost(request: Request) -> int:
    """Return what a request will probably take, in tokens: one for four bytes of its body, and its longest answer.

    The answer counts with the length that the request allows, or else with :data:`DEFAULT_ANSWER`; embeddings, ranks
    and moderations have none. Each of the two counts with :data:`LARGEST_PART` at most, and so does a body of unknown
    length.
    """
    size = request.size
    prompt = LARGEST_PART if size < 0 else min(size // _BYTES_PER_TOKEN, LARGEST_PART)
    if request.kind in _PROMPT_ONLY:
        return max(1, prompt)
    answer = request.max_tokens if request.max_tokens > 0 else DEFAULT_ANSWER
    return prompt + min(answer, LARGEST_PART)


class QueueFull(Exception):
    """As many requests wait as may wait, and the principal has its share of them."""


@attrs.define(eq=False)
class Waiting(Generic[T]):
    """An item that waits.

    Attributes:
        item: as given.
        cost: as given.
        flow: what it is part of.
    """

    item: T
    cost: float
    flow: Flow[T]


@attrs.define(eq=False)
class Flow(Generic[T]):
    """What waits of one principal.

    Attributes:
        name: the principal's name.
        share: its weight, as of its latest request.
        waiting: its items, first come first.
        deficit: units of cost that it has been granted and has not used; negative: it owes them.
        in_turn: it has been granted a quantum in its present turn.
    """

    name: str
    share: float
    waiting: OrderedDict[Waiting[T], None] = attrs.field(factory=OrderedDict)
    deficit: float = 0.0
    in_turn: bool = False

    @property
    def crowding(self) -> float:
        """How many items wait, for its weight."""
        return len(self.waiting) / self.share

    def first(self) -> Waiting[T]:
        """Return the item that is next in this flow."""
        return next(iter(self.waiting))


class FairQueue(Generic[T]):
    """Items of several principals, waiting. See the top of this module. Everything here is synchronous.

    Args:
        bound: how many items may wait.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._size = 0
        self._flows: dict[str, Flow[T]] = {}
        # In the order of their turns.
        self._ring: deque[Flow[T]] = deque()

    def __len__(self) -> int:
        return self._size

    def counts(self) -> dict[str, int]:
        """Return how many items wait, by the names of their principals."""
        return {flow.name: len(flow.waiting) for flow in self._flows.values()}

    def has_room(self, name: str, share: float) -> bool:
        """Return whether an item of a principal would be taken."""
        return self._size < self._bound or self._most_crowded(name, share) is not None

    def push(self, item: T, name: str, share: float, cost: float) -> tuple[Waiting[T], T | None]:
        """Add an item.

        Args:
            item: what waits.
            name: the principal's name. All that have no name are one principal.
            share: its weight, more than 0. It holds for all that wait of this principal.
            cost: more than 0.

        Returns:
            What to give to :meth:`discard`, and the item that had to go, if the queue was full.

        Raises:
            QueueFull: the queue is full, and the principal has its share of it.
        """
        dropped: T | None = None
        if self._size >= self._bound:
            crowded = self._most_crowded(name, share)
            if crowded is None:
                raise QueueFull
            last = next(reversed(crowded.waiting))
            self.discard(last)
            dropped = last.item
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = Flow(name, share)
            self._ring.append(flow)
        flow.share = share
        waiting = Waiting(item, cost, flow)
        flow.waiting[waiting] = None
        self._size += 1
        return waiting, dropped

    def discard(self, waiting: Waiting[T]) -> None:
        """Remove an item that is not wanted any more. Without effect if it is not waiting."""
        flow = waiting.flow
        if waiting not in flow.waiting:
            return
        self._remove(waiting)
        if flow.waiting:
            # What it has been granted for a request that is gone is not for others.
            flow.deficit = min(flow.deficit, max(flow.first().cost, QUANTUM * flow.share))

    def _remove(self, waiting: Waiting[T]) -> None:
        flow = waiting.flow
        del flow.waiting[waiting]
        self._size -= 1
        if not flow.waiting:
            del self._flows[flow.name]
            self._ring.remove(flow)

    def settle(self, name: str, difference: float) -> None:
        """Charge a principal for an item that has been taken. Without effect if nothing of it waits.

        Args:
            name: the principal's name.
            difference: by how much the item has cost more than estimated; negative: less.
        """
        flow = self._flows.get(name)
        if flow is not None:
            most = max(flow.deficit, flow.first().cost, QUANTUM * flow.share)
            flow.deficit = max(-_MOST_DEBT, min(flow.deficit - difference, most))

    def pop(self) -> T:
        """Remove the item that is next, and return it.

        Raises:
            IndexError: nothing waits.
        """
        ring = self._ring
        turns = 0
        while True:
            flow = ring[0]
            first = flow.first()
            if len(ring) == 1:
                # The order is the same whatever it has been granted.
                flow.deficit = max(flow.deficit, first.cost)
            elif not flow.in_turn:
                flow.in_turn = True
                flow.deficit += QUANTUM * flow.share
            if first.cost <= flow.deficit:
                flow.deficit -= first.cost
                self._remove(first)
                return first.item
            flow.in_turn = False
            ring.rotate(-1)
            turns += 1
            if turns == len(ring):
                turns = 0
                self._skip_rounds()

    def _skip_rounds(self) -> None:
        """Grant what the rounds would grant in which no item can be taken."""
        rounds = min(
            math.ceil((flow.first().cost - flow.deficit) / (QUANTUM * flow.share)) for flow in self._ring
        )
        if rounds > 1:
            for flow in self._ring:
                flow.deficit += (rounds - 1) * QUANTUM * flow.share

    def _most_crowded(self, name: str, share: float) -> Flow[T] | None:
        """Return the flow with the most items for its weight; ``None`` if that would be the one of ``name``."""
        flow = self._flows.get(name)
        mine = (1 if flow is None else len(flow.waiting) + 1) / share
        crowded = max(self._flows.values(), key=lambda flow: flow.crowding, default=None)
        # At a tie, the newcomer goes. Otherwise two principals would drop each other's requests in turns.
        return None if crowded is None or crowded is flow or crowded.crowding <= mine else crowded
