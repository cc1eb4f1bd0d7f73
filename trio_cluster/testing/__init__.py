"""Help for testing programs that are built on trio_cluster, and trio_cluster itself."""

from ._grammar import StreamGrammarError, StreamReport, read_stream

__all__ = ["StreamGrammarError", "StreamReport", "read_stream"]
