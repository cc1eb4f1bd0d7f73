"""The pytest plugin, as it works in a project that has it installed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import trio

from trio_cluster.testing import _trio_internals

pytest_plugins = ["pytester"]

PRELUDE = """
    import pytest, trio
    from trio_cluster.testing import FakeModel, SimulatedCluster, worker

    async def start(cluster, model, **options):
        server = worker("w1", **options)
        server.register_chat("m", model)
        await cluster.start_worker(server)
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    return pytester


def run(
    project: pytest.Pytester, tests: str, *arguments: str, with_asyncio: bool = False
) -> pytest.RunResult:
    """Run tests in a project of their own, without pytest-asyncio unless the project has set it up."""
    project.makepyfile(PRELUDE + tests)
    return project.runpytest_inprocess(*arguments, *(() if with_asyncio else ("-p", "no:asyncio")))


@pytest.mark.parametrize("trio_mode", [True, False])
def test_the_fixture_is_a_cluster_in_virtual_time(project: pytest.Pytester, trio_mode: bool) -> None:
    if trio_mode:
        project.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    result = run(
        project,
        """
    async def test_hours(cluster: SimulatedCluster) -> None:
        model = FakeModel(tokens=100, interval=50)
        await start(cluster, model)
        response = await cluster.client().chat("m")
        assert response.report().text == model.text()
        assert trio.current_time() == 99 * 50

    async def test_own_clock(cluster, autojump_clock, nursery):
        await trio.sleep(1000)
        assert autojump_clock.current_time() == 1000

    @pytest.mark.trio
    @pytest.mark.parametrize("number", [1, 2])
    async def test_marked(cluster, number):
        await trio.sleep(1000)

    class TestInside:
        async def test_method(self, cluster):
            await trio.sleep(1000)
        """,
    )
    result.assert_outcomes(passed=5)


def test_orphans_fail_the_test_and_its_seed_is_reported(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
    async def test_leaves_work(cluster):
        await start(cluster, FakeModel(stall_at=1, hang_in_cleanup=500))
        async with cluster.client().open_chat("m") as response:
            await response.receive_until(b"t0")
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*OrphansLeft: the cluster is not quiescent:", "*w1: 1 slots taken"])
    result.stdout.re_match_lines([r"to reproduce: --cluster-seed=\d+$"])


def test_a_stream_that_breaks_the_grammar_fails_the_test(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
    async def test_nonsense(cluster):
        await start(cluster, FakeModel())
        await cluster.client().chat("m")
        cluster.responses[0].received += b"more"
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*StreamGrammarError: b'more' after the end of the stream*"])


def test_the_cluster_of_a_test_that_fails_by_itself_is_not_checked(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
    async def test_fails(cluster):
        await start(cluster, FakeModel(stall_at=1, hang_in_cleanup=500))
        async with cluster.client().open_chat("m") as response:
            await response.receive_until(b"t0")
            assert "this" == "that"
        """,
    )
    result.assert_outcomes(failed=1)
    output = result.stdout.str()
    assert "OrphansLeft" not in output
    assert "'this' == 'that'" in output
    assert "--cluster-seed=" in output


def test_the_seed_makes_a_test_reproducible(project: pytest.Pytester) -> None:
    tests = """
    import random
    async def test_draws(cluster, cluster_seed):
        health = await cluster.client().get("/health")
        print("drawn", cluster_seed, random.random(), health.headers["x-request-id"])
    """
    drawn = [
        re.findall(r"^drawn .*$", run(project, tests, "-rP", *seed).stdout.str(), re.M)
        for seed in (["--cluster-seed=7"], ["--cluster-seed", "7"], ["--cluster-seed=8"], [], [])
    ]
    assert all(len(each) == 1 for each in drawn)
    assert drawn[0] == drawn[1]
    assert drawn[0][0].startswith("drawn 7 ")
    assert len({each[0] for each in drawn[1:]}) == 4


def test_the_seed_of_a_failure_reproduces_it(project: pytest.Pytester) -> None:
    tests = """
    import random
    async def test_luck(cluster):
        assert random.random() < -1, f"drawn {random.random()}"
    """
    first = run(project, tests).stdout.str()
    (seed,) = set(re.findall(r"--cluster-seed=(\d+)", first))
    again = run(project, tests, f"--cluster-seed={seed}").stdout.str()
    assert set(re.findall(r"drawn [\d.]+", first)) == set(re.findall(r"drawn [\d.]+", again))


SEEDED = """
    async def test_it(cluster):
        assert (await cluster.client().get("/health")).status == 200
"""


def test_a_trio_that_cannot_be_seeded_is_no_reason_to_fail(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trio_internals, "_GENERATOR", "_no_longer_there")
    run(project, SEEDED).assert_outcomes(passed=1)
    failing = run(project, SEEDED + '        assert "this" == "that"\n')
    failing.assert_outcomes(failed=1)
    assert "--cluster-seed" not in failing.stdout.str()


def test_with_a_trio_that_cannot_be_seeded_a_given_seed_is_an_error_that_names_trio(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trio_internals, "_GENERATOR", "_no_longer_there")
    result = run(project, SEEDED, "--cluster-seed=1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [f"*RuntimeError: the scheduler of trio {trio.__version__} cannot be seeded: *"]
    )


def test_skipped_tests_and_expected_failures_are_reported_as_such(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
    async def test_skips(cluster):
        pytest.skip("not today")

    @pytest.mark.xfail
    async def test_fails(cluster):
        assert False
        """,
    )
    result.assert_outcomes(skipped=1, xfailed=1)


def test_a_test_that_is_not_async_fails_with_a_message(project: pytest.Pytester) -> None:
    result = run(project, "\n    def test_plain(cluster): pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["the fixture 'cluster' is for async tests"])


def test_without_pytest_trio_the_message_says_what_is_missing(project: pytest.Pytester) -> None:
    tests = "\n    async def test_it(cluster): pass\n\n    def test_other(): pass\n"
    result = run(project, tests, "-p", "no:trio")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["the fixture 'cluster' needs pytest-trio: pip install pytest-trio"])


def test_a_fixture_of_the_project_takes_precedence(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
    @pytest.fixture
    def cluster():
        return "mine"

    def test_plain(cluster):
        assert cluster == "mine"

    @pytest.mark.trio
    async def test_async(cluster):
        assert cluster == "mine"
        assert not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
        """,
    )
    result.assert_outcomes(passed=2)


def test_the_plugin_is_installed_and_costs_nothing_where_it_is_not_used() -> None:
    (point,) = entry_points(group="pytest11", name="trio_cluster")
    program = (
        f"import sys, {point.value}\n"
        "imported = {'trio_cluster', 'trio', 'quart', 'hypercorn'} & sys.modules.keys()\n"
        "assert not imported, imported"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_the_fixture_works_beside_pytest_asyncio(project: pytest.Pytester, mode: str) -> None:
    pytest.importorskip("pytest_asyncio", reason="pytest-asyncio is not installed; the group 'test' has it")
    project.makeini(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    result = run(
        project,
        """
    import asyncio

    @pytest.fixture
    async def model(cluster):
        model = FakeModel(tokens=10, interval=50)
        await start(cluster, model)
        yield model
        await trio.sleep(1)

    async def test_hours(cluster: SimulatedCluster, model) -> None:
        response = await cluster.client().chat("m")
        assert response.report().text == model.text()
        assert trio.current_time() == 9 * 50

    @pytest.mark.parametrize("number", [1, 2])
    async def test_numbers(cluster, number):
        assert number in (1, 2)
        await trio.sleep(1000)

    class TestInside:
        async def test_method(self, cluster):
            await trio.sleep(1000)

    @pytest.fixture
    def plain():
        return 7

    @pytest.mark.asyncio
    async def test_of_asyncio(plain):
        await asyncio.sleep(0)
        assert plain == 7
        """,
        with_asyncio=True,
    )
    result.assert_outcomes(passed=5)
