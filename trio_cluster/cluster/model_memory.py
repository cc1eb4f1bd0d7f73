"""A master's memory of the models that it serves, over a restart.

After a restart the workers come back one after the other, and a request for a model whose worker is not back yet should
be repeated by its client. So a master writes into its state directory which models there are, and a master that starts
takes those as models that have just left; see ``routing/absence.py``.

A master that stops closes the links of its workers first, so all their models leave before its end. Models that leave
as late as that are written down as served: otherwise the absence of the master would count as theirs.

What workers served whose machines can be woken is in a second file, since it is remembered for as long as they sleep;
see ``sleeping.py``.

The files are written when a model comes or goes, at most once a second. What cannot be written is logged once.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import attrs
import msgspec
import trio

from ..core.limits import CLOSE_TIMEOUT
from ..core.model import KINDS, ModelInfo
from ..core.state_dir import StateDir, StateDirError
from ..core.threads import NoThread, run_in_thread
from ..routing.absence import REMEMBERED
from ..routing.catalog import Catalog
from .sleeping import SleepingWorkers

__all__ = ["ModelMemory"]

logger = logging.getLogger("trio_cluster.node")

_FILE: Final = "models.json"
_SLEEPING_FILE: Final = "sleeping.json"
#: Seconds between two writes.
_PAUSE: Final = 1.0
#: Seconds from the moment at which a master that stops begins to close its links to its end, and some to spare. The
#: links and the clients' connections are given CLOSE_TIMEOUT each, and the latter are closed by force in as much again.
_LAST_SECONDS: Final = 4 * CLOSE_TIMEOUT


@attrs.frozen
class _Entry:
    """A model in the file, or a part of one that is away; a model may have several entries."""

    name: str
    kind: str
    endpoints: list[str] = attrs.field(factory=list)
    left: float | None = None
    """When its last replica left, in seconds since the epoch; ``None`` if it was served when the file was written."""


class ModelMemory:
    """Writes down which models a catalogue has, and reads it back.

    Args:
        catalog: the models of the master.
        state_dir: where the files are.
        sleeping: the workers whose models are in the second file; ``None``: there are none.
    """

    def __init__(
        self, catalog: Catalog, state_dir: StateDir, sleeping: SleepingWorkers | None = None
    ) -> None:
        self._catalog = catalog
        self._state_dir = state_dir
        self._sleeping = sleeping
        self._changed = trio.Event()
        # What is in the files, as far as this process has written it.
        self._written: dict[str, bytes] = {}
        self._failed = False
        self._suspended = False

    def restore(self) -> None:
        """Let the catalogue know the models that the files name. Synchronous; reads files.

        A model that was served when its master ended counts from now, however long that is ago: its workers are
        looking for the master. A file that cannot be understood is ignored.

        Raises:
            StateDirError: there is a file, and it cannot be read.
        """
        self._restore_absent()
        if self._sleeping and (content := self._state_dir.read(_SLEEPING_FILE)) is not None:
            self._sleeping.restore(content)

    def _restore_absent(self) -> None:
        content = self._state_dir.read(_FILE)
        try:
            entries = [] if content is None else msgspec.json.decode(content, type=list[_Entry])
        except msgspec.MsgspecError as error:
            logger.warning("the names of models that were served are lost: %s: %s", _FILE, error)
            return
        now = time.time()
        for entry in sorted(entries, key=lambda entry: entry.left or now):
            age = 0.0 if entry.left is None else max(0.0, now - entry.left)
            if age < REMEMBERED and entry.kind in KINDS:
                try:
                    info = ModelInfo(entry.name, entry.kind, extra_endpoints=tuple(entry.endpoints))
                except (TypeError, ValueError):
                    continue
                self._catalog.remember(info, age=age)

    def suspend(self) -> None:
        """Write nothing more: another process has the state directory. Synchronous."""
        self._suspended = True

    def resume(self) -> None:
        """Write again, and all files once, in which another process may have written. Synchronous."""
        self._suspended = False
        self._written.clear()
        self._changed.set()

    def save(self) -> None:
        """Write the files that would not be the same. Blocks.

        Raises:
            StateDirError: one cannot be written.
        """
        for name, content in self._unwritten().items():
            self._state_dir.write(name, content)
            self._written[name] = content

    async def run(self) -> None:
        """Keep the files up to date until cancelled, and write them a last time then."""
        self._catalog.on_names_changed = lambda: self._changed.set()
        if self._sleeping:
            self._sleeping.on_changed = lambda: self._changed.set()
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                contents = self._unwritten()
                if contents and not self._suspended:
                    try:
                        await run_in_thread(self._write, contents)
                    except NoThread:
                        self._write(contents)
                await trio.sleep(_PAUSE)
        finally:
            self._catalog.on_names_changed = lambda: None
            contents = self._unwritten(still_served=_LAST_SECONDS)
            if not self._suspended:
                self._write(contents)

    def _write(self, contents: dict[str, bytes]) -> None:
        try:
            for name, content in contents.items():
                self._state_dir.write(name, content)
                self._written[name] = content
        except StateDirError as error:
            if not self._failed:
                self._failed = True
                logger.warning("the names of models will not survive a restart: %s", error)
        else:
            self._failed = False

    def _unwritten(self, *, still_served: float = 0.0) -> dict[str, bytes]:
        """Return what is to be in the files whose content is not known to be that. See :meth:`_content`."""
        contents = {_FILE: self._content(still_served=still_served)}
        if self._sleeping:
            contents[_SLEEPING_FILE] = self._sleeping.content()
        return {name: content for name, content in contents.items() if self._written.get(name) != content}

    def _content(self, *, still_served: float = 0.0) -> bytes:
        """Return what is to be in the file.

        Args:
            still_served: a model that left less than so many seconds ago counts as served.
        """
        now = time.time()
        infos = self._catalog.infos()
        entries = [_entry(info, None) for info in infos]
        # A passthrough model beside replicas of another kind, which name the model. It answers everything.
        beside = [info for info in infos if info.kind != "any" and info.name in self._catalog.passthrough]
        entries += [_Entry(info.name, "any") for info in beside]
        # Whole seconds, so that the same models make the same content.
        entries += [
            _entry(info, None if age < still_served else round(now - age))
            for info, age in self._catalog.absent
        ]
        return msgspec.json.encode(entries)


def _entry(info: ModelInfo, left: float | None) -> _Entry:
    return _Entry(info.name, info.kind, list(info.extra_endpoints), left)
