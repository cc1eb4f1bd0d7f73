"""Through which clusters a model, or a request, has come.

Clusters can serve each other's models (engine ``openai``). So that they do not serve a model in a circle, each has an
id, and two things carry the ids of the clusters that they have passed:

- an entry of ``/v1/models``, in the field :data:`VIA_FIELD`: a model that came through a cluster is not taken by it;
- a request that is sent to another server, in the header :data:`VIA_HEADER`: one that comes back is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

__all__ = ["MAX_CLUSTERS", "VIA_FIELD", "VIA_HEADER", "Via", "format_via", "parse_via", "read_via"]

VIA_HEADER: Final = "x-trio-cluster-via"
VIA_FIELD: Final = "trio_cluster_via"

#: The ids of clusters, in the order in which they were passed.
Via: TypeAlias = tuple[str, ...]

#: Clusters that a request may pass. More are a circle of clusters that do not know their own ids, for instance because
#: they are restarted all the time.
MAX_CLUSTERS: Final = 16

_ID: Final = re.compile(r"[0-9a-zA-Z_.-]{1,64}")


def parse_via(header: str) -> Via:
    """Return the ids in a header; what is no id is left out."""
    return _ids(part.strip() for part in header.split(","))


def read_via(value: Any) -> Via:
    """Return the ids in the field of a model's entry; what is no id is left out."""
    return _ids(part for part in value if isinstance(part, str)) if isinstance(value, list) else ()


def format_via(via: Via) -> str:
    """Return ids as the value of the header."""
    return ", ".join(via)


def _ids(parts: Iterable[str]) -> Via:
    return tuple(filter(_ID.fullmatch, parts))[: MAX_CLUSTERS + 1]
