"""The proof that the process of a session has ended: who has it can end the session, and do nothing else with it.

The id of a session would be such a proof, too; but with it the session could be resumed. What is derived from it can be
given to another process, which is small and may live longer. Only the two ends know the id, so only they, and whom the
worker has given the proof, can have it.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

__all__ = ["proof_of_end"]

_PURPOSE: Final = b"trio_cluster: the process of the worker has ended"


def proof_of_end(session_id: str) -> str:
    """Return the proof for a session: 128 bits, as hexadecimal digits.

    Args:
        session_id: see ``Handshake.session``; not empty.
    """
    return hmac.new(bytes.fromhex(session_id), _PURPOSE, hashlib.sha256).hexdigest()[:32]
