"""Everything is restarted, one process after the other, while clients ask and ask: they notice nothing.

Two masters stand behind nginx, with the configuration of the page, and three workers are linked to both.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import trio
from nodes import Nodes
from served import until
from test_proxies import needs_nginx, open_two_masters
from test_rolling_restart import PLAIN, STREAMING, Load
from test_several_masters_processes import WORKERS, has_workers, start, start_master, start_worker

#: Seconds for which rounds of restarts follow each other; there are at least two then. 0: one round.
UPGRADE_SECONDS: Final = float(os.environ.get("UPGRADE_SECONDS", "0"))

pytestmark = [pytest.mark.processes, needs_nginx]


async def test_a_rolling_upgrade_of_everything_is_not_noticed_by_clients(
    nodes: Nodes, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    masters, workers = await start(nodes)
    restarts: dict[str, int] = {"masters": 0, "workers": 0}

    async def all_linked() -> bool:
        return all([await has_workers(master) for master in masters])

    async with open_two_masters(tmp_path, (masters[0].port, masters[1].port)) as url:
        load = Load(url, pause=0.01 if UPGRADE_SECONDS else 0.02)
        # A process that is stopped has these for seconds, and refuses new ones meanwhile.
        long = Load(url, pause=0.3)
        async with trio.open_nursery() as asking:
            kinds = [True] * STREAMING + [False] * PLAIN
            for number, stream in enumerate(kinds):
                asking.start_soon((long if UPGRADE_SECONDS and number % 6 == 5 else load).ask, stream)
            await load.go_on(20)
            began = trio.current_time()
            for done in itertools.count(1):
                for i, master in enumerate(masters):
                    master.send(signal.SIGTERM)
                    assert await master.exit_code(within=20) == 0
                    await load.go_on(12)
                    masters[i] = await start_master(nodes, master.port)
                    await until(all_linked, within=20)
                    restarts["masters"] += 1
                for name in WORKERS:
                    workers[name].send(signal.SIGTERM)
                    assert await workers[name].exit_code(within=20) == 0
                    await load.go_on(12)
                    workers[name] = await start_worker(nodes, masters, name)
                    await until(all_linked, within=20)
                    restarts["workers"] += 1
                if trio.current_time() - began >= UPGRADE_SECONDS and done >= (2 if UPGRADE_SECONDS else 1):
                    break
            load.over = long.over = True
    asked = load.asked + long.asked
    assert load.failures + long.failures == []
    assert nodes.notes() == ["m finished"] * asked.total()
    for figure, value in [*asked.items(), *restarts.items()]:
        record_property(figure, value)
