"""A kit for testing programs that are built on trio_cluster, and trio_cluster itself.

It has a cluster in one process, in virtual time, on a simulated network (:func:`open_cluster`); models with a known
output (:class:`FakeModel`); checks of handlers (:func:`check_handler`), streams (:func:`read_stream`) and clusters
(:func:`settle`); and random schedules of faults (:func:`run_schedule`).
"""

from typing import TYPE_CHECKING

from ._client import Response, SimulatedClient, StreamingResponse, check_streams
from ._cluster import SimulatedCluster, SimulatedNode, open_cluster, worker
from ._conformance import check_handler
from ._deprecation import warn_renamed
from ._grammar import StreamGrammarError, StreamReport, read_stream
from ._handler_contract import (
    BrokenPromise,
    DoesNotAnswer,
    DoesNotStop,
    HandlerReport,
    HidesErrors,
    LeavesWorkBehind,
    MissesDeadline,
    MixesAnswers,
)
from ._models import FakeModel, ThreadedFakeModel
from ._network import Connection, Host, SimulatedNetwork
from ._quiescence import OrphansLeft, assert_no_orphans, assert_stats_balance, settle
from ._schedule import ScheduleFailed, ScheduleReport, run_schedule
from ._seed import seeded
from ._streams import SimulatedStream

__all__ = [
    "BrokenPromise",
    "Connection",
    "DoesNotAnswer",
    "DoesNotStop",
    "FakeModel",
    "HandlerReport",
    "HidesErrors",
    "Host",
    "LeavesWorkBehind",
    "MissesDeadline",
    "MixesAnswers",
    "OrphansLeft",
    "Response",
    "ScheduleFailed",
    "ScheduleReport",
    "SimulatedClient",
    "SimulatedCluster",
    "SimulatedNetwork",
    "SimulatedNode",
    "SimulatedStream",
    "StreamGrammarError",
    "StreamReport",
    "StreamingResponse",
    "ThreadedFakeModel",
    "assert_no_orphans",
    "assert_stats_balance",
    "check_handler",
    "check_streams",
    "open_cluster",
    "read_stream",
    "run_schedule",
    "seeded",
    "settle",
    "worker",
]

# Deprecated names. Type checkers see plain aliases: a module with ``__getattr__`` has every name for them.
if TYPE_CHECKING:
    Answer = Response
    StreamingAnswer = StreamingResponse
    assert_books_balance = assert_stats_balance
else:
    _RENAMED = {
        "Answer": "Response",
        "StreamingAnswer": "StreamingResponse",
        "assert_books_balance": "assert_stats_balance",
    }

    def __getattr__(name):
        """Return what has a deprecated name, with a warning."""
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warn_renamed(f"{__name__}.{name}", f"{__name__}.{_RENAMED[name]}")
        return globals()[_RENAMED[name]]
