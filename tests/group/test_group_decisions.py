"""What a group decides, without processes: when to start one again, and what several answers are together."""

from __future__ import annotations

import json
from typing import Any

from trio_cluster.group.messages import Process, Response
from trio_cluster.group.metrics import RetiredCounters, merge_metrics
from trio_cluster.group.restarts import Restarts
from trio_cluster.group.status import merge_calls, merge_status


def test_a_process_that_does_not_live_long_waits_longer_each_time() -> None:
    restarts = Restarts()
    assert [restarts.ended(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    # One that was healthy is back at once, and has its short pauses again.
    assert restarts.ended(60.0) == 0
    assert restarts.ended(1.0) == 0.5
    assert restarts.count == 10


def metrics(**values: float) -> bytes:
    return (
        "# HELP trio_cluster_calls_admitted_total Calls that were opened.\n"
        "# TYPE trio_cluster_calls_admitted_total counter\n"
        f"trio_cluster_calls_admitted_total {values['admitted']}\n"
        "# HELP trio_cluster_cancel_seconds Time.\n"
        "# TYPE trio_cluster_cancel_seconds histogram\n"
        f'trio_cluster_cancel_seconds_bucket{{le="0.5"}} {values["fast"]}\n'
        f'trio_cluster_cancel_seconds_bucket{{le="+Inf"}} {values["fast"]}\n'
        f"trio_cluster_cancel_seconds_count {values['fast']}\n"
        f"trio_cluster_cancel_seconds_sum {values['fast']}\n"
        "# HELP trio_cluster_calls_in_flight Calls.\n"
        "# TYPE trio_cluster_calls_in_flight gauge\n"
        f"trio_cluster_calls_in_flight {values['running']}\n"
        "# HELP trio_cluster_workers Workers.\n"
        "# TYPE trio_cluster_workers gauge\n"
        f"trio_cluster_workers {values['workers']}\n"
        "# HELP trio_cluster_draining 1.\n"
        "# TYPE trio_cluster_draining gauge\n"
        f"trio_cluster_draining {values['draining']}\n"
        "# HELP trio_cluster_worker_state State.\n"
        "# TYPE trio_cluster_worker_state gauge\n"
        f'trio_cluster_worker_state{{worker="w",state="ok"}} {values["ok"]}\n'
        f'trio_cluster_worker_state{{worker="w",state="busy"}} {1 - values["ok"]}\n'
    ).encode()


ONE = metrics(admitted=5, fast=2, running=1, workers=2, draining=1, ok=1)
OTHER = metrics(admitted=7, fast=3, running=4, workers=1, draining=0, ok=0)


def test_counters_are_added_up_and_gauges_as_it_fits() -> None:
    lines = merge_metrics([ONE, OTHER]).decode().splitlines()
    assert "trio_cluster_calls_admitted_total 12.0" in lines
    assert 'trio_cluster_cancel_seconds_bucket{le="0.5"} 5.0' in lines
    assert "trio_cluster_cancel_seconds_sum 5.0" in lines
    assert "trio_cluster_calls_in_flight 5.0" in lines
    # The workers are the same ones, and the state of each is one.
    assert "trio_cluster_workers 2.0" in lines
    assert 'trio_cluster_worker_state{state="ok",worker="w"} 1.0' in lines
    assert 'trio_cluster_worker_state{state="busy",worker="w"} 0.0' in lines
    assert "trio_cluster_draining 0.0" in lines
    assert "# TYPE trio_cluster_calls_admitted_total counter" in lines


def test_what_a_process_has_counted_is_not_lost_with_it() -> None:
    retired = RetiredCounters()
    retired.note({0: Response(200, [], ONE), 1: Response(200, [], OTHER)})
    retired.retire(1)
    new = metrics(admitted=1, fast=0, running=0, workers=2, draining=0, ok=1)
    answers = {0: Response(200, [], ONE), 1: Response(200, [], new)}
    retired.note(answers)
    lines = merge_metrics([ONE, new], retired.text(answers)).decode().splitlines()
    assert "trio_cluster_calls_admitted_total 13.0" in lines
    assert "trio_cluster_calls_in_flight 1.0" in lines
    # Nor that of one that does not answer; and it dies twice.
    lines = merge_metrics([ONE], retired.text({0: answers[0]})).decode().splitlines()
    assert "trio_cluster_calls_admitted_total 13.0" in lines
    retired.retire(1)
    lines = merge_metrics([ONE], retired.text({0: answers[0]})).decode().splitlines()
    assert "trio_cluster_calls_admitted_total 13.0" in lines


def test_a_process_that_ends_after_its_answer_does_not_count_twice() -> None:
    retired = RetiredCounters()
    answers = {0: Response(200, [], ONE), 1: Response(200, [], OTHER)}
    retired.note(answers)
    asked = retired.ends()
    # It has answered, and ends while others are still waited for.
    retired.retire(1)
    assert retired.without_ended(answers, asked) == {0: answers[0]}
    assert retired.without_ended(answers, retired.ends()) == answers


def worker(**fields: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "id": "w", "state": "ok", "draining": False, "models": ["m"], "running": 3, "in_flight": 1,
        "in_flight_elsewhere": 0, "waiting_by": {}, "ejected": {}, "connected_for": 1.0,
    }  # fmt: skip
    return known | fields


def status(name: str, *workers: dict[str, Any], **fields: Any) -> bytes:
    known: dict[str, Any] = {
        "node_id": name, "uptime": 1.0, "draining": False, "models": [{"id": "m", "nodes": ["w"]}],
        "calls": {"admitted": 4, "in_flight": 1}, "ejected": [], "masters": [], "workers": workers,
        "slots": {"running": 0, "waiting": 1, "capacity": 10, "waiting_by": {"k": 1}},
    }  # fmt: skip
    return json.dumps(known | fields).encode()


def test_the_status_of_several_processes_is_that_of_one_node() -> None:
    own = status(
        "m-0",
        worker(in_flight_elsewhere=6, state="suspended"),
        masters=[
            {"id": "m-1", "address": "a, process 1", "workers": ["w"]},
            {"id": "m-2", "address": "a, process 2", "workers": ["w"]},
            {"id": "x", "address": "b", "workers": ["w"]},
        ],
    )
    other = status("m-1", worker(in_flight=4, in_flight_elsewhere=3), worker(id="v"), uptime=9.0)
    processes = [
        Process(0, 10, True, 0, None),
        Process(1, 11, True, 2, None),
        Process(2, 12, True, 0, None),
        Process(3, 13, False, 0, None),
        Process(4, 0, False, 3, None),
    ]
    merged = json.loads(merge_status(own, {1: other, 0: own}, processes))
    assert merged["node_id"] == "m-0"
    assert merged["uptime"] == 9.0
    assert merged["calls"] == {"admitted": 8, "in_flight": 2}
    assert merged["slots"] == {"running": 0, "waiting": 2, "capacity": 20, "waiting_by": {"k": 2}}
    first, second = merged["workers"]
    assert (first["id"], first["processes"]) == ("v", [1])
    assert (second["id"], second["processes"], second["state"]) == ("w", [0, 1], "ok")
    # Six elsewhere as the first one sees it, of which four are the second one's; three as the second one sees it.
    assert (second["in_flight"], second["in_flight_elsewhere"]) == (5, 2)
    assert [master["id"] for master in merged["masters"]] == ["x"]
    assert [each["state"] for each in merged["processes"]] == ["ok", "ok", "silent", "starting", "down"]
    assert merged["processes"][1]["restarts"] == 2


def test_calls_of_all_processes_are_listed_by_their_age() -> None:
    bodies = [json.dumps({"calls": [{"age": age} for age in ages]}).encode() for ages in ([3, 1], [2])]
    assert [call["age"] for call in json.loads(merge_calls(bodies))["calls"]] == [3, 2, 1]
