"""Help for testing programs that are built on trio_cluster, and trio_cluster itself."""

from ._client import Answer, SimulatedClient, StreamingAnswer, check_streams
from ._cluster import SimulatedCluster, SimulatedNode, open_cluster, worker
from ._conformance import check_handler
from ._grammar import StreamGrammarError, StreamReport, read_stream
from ._models import FakeModel, ThreadedFakeModel
from ._network import Connection, Host, SimulatedNetwork
from ._promises import (
    BrokenPromise,
    DoesNotAnswer,
    DoesNotStop,
    HandlerReport,
    HidesErrors,
    LeavesWorkBehind,
    MissesDeadline,
    MixesAnswers,
)
from ._rest import OrphansLeft, assert_books_balance, assert_no_orphans, settle
from ._schedule import ScheduleFailed, ScheduleReport, run_schedule
from ._seed import seeded
from ._streams import SimulatedStream

__all__ = [
    "Answer",
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
    "ScheduleFailed",
    "ScheduleReport",
    "SimulatedClient",
    "SimulatedCluster",
    "SimulatedNetwork",
    "SimulatedNode",
    "SimulatedStream",
    "StreamGrammarError",
    "StreamReport",
    "StreamingAnswer",
    "ThreadedFakeModel",
    "assert_books_balance",
    "assert_no_orphans",
    "check_handler",
    "check_streams",
    "open_cluster",
    "read_stream",
    "run_schedule",
    "seeded",
    "settle",
    "worker",
]
