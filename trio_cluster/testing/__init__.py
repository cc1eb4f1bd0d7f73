"""Help for testing programs that are built on trio_cluster, and trio_cluster itself."""

from ._client import Answer, SimulatedClient, StreamingAnswer
from ._cluster import SimulatedCluster, SimulatedNode, open_cluster, worker
from ._grammar import StreamGrammarError, StreamReport, read_stream
from ._network import Connection, Host, SimulatedNetwork, SimulatedStream

__all__ = [
    "Answer",
    "Connection",
    "Host",
    "SimulatedClient",
    "SimulatedCluster",
    "SimulatedNetwork",
    "SimulatedNode",
    "SimulatedStream",
    "StreamGrammarError",
    "StreamReport",
    "StreamingAnswer",
    "open_cluster",
    "read_stream",
    "worker",
]
