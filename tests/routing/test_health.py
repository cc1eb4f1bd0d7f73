"""Whether a replica may be given calls."""

from __future__ import annotations

from trio_cluster.routing.health import Health


def test_a_replica_is_available_until_something_is_known_against_it() -> None:
    health = Health()
    assert health.available
    health.stall("blocked for 2 s")
    assert not health.available
    health.stall("")
    assert health.available
    health.drain()
    assert not health.available


def test_a_replica_that_drains_is_not_available_again_when_it_recovers_from_a_stall() -> None:
    health = Health()
    health.drain()
    health.stall("blocked")
    health.stall("")
    assert not health.available


def test_a_replica_that_is_lost_stays_lost() -> None:
    health = Health()
    health.lose("killed")
    health.stall("")
    assert (health.available, health.lost) == (False, "killed")
