"""Former names of the kit still work, each with a warning that names the new one."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from trio_cluster import testing
from trio_cluster.testing import SimulatedClient, SimulatedCluster, SimulatedNetwork, open_cluster


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Answer", "Response"),
        ("StreamingAnswer", "StreamingResponse"),
        ("assert_books_balance", "assert_stats_balance"),
    ],
)
def test_a_former_name_is_the_new_one_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=f"{old} is deprecated, use trio_cluster.testing.{new}"
    ) as caught:
        assert getattr(testing, old) is getattr(testing, new)
    assert [each.filename for each in caught] == [__file__]
    assert old not in testing.__all__


def test_a_former_name_can_be_imported() -> None:
    with pytest.warns(DeprecationWarning, match="Answer is deprecated"):
        from trio_cluster.testing import Answer
    assert Answer is testing.Response


def test_a_name_that_never_existed_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        testing.Nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_cluster_takes_the_former_argument(fast_path: bool, autojump_clock: MockClock) -> None:
    with pytest.warns(DeprecationWarning, match="use fast_path=") as caught:
        opening = open_cluster(short_way=fast_path)
    assert [each.filename for each in caught] == [__file__]
    async with opening as cluster:
        stream = await cluster.network.host("client").connect("master", 8080)
        assert stream.writes_directly is fast_path
        stream.close()


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_network_takes_the_former_argument(fast_path: bool) -> None:
    with pytest.warns(DeprecationWarning, match="use fast_path=") as caught:
        network = SimulatedNetwork(short_way=fast_path)
    assert [each.filename for each in caught] == [__file__]
    (listener,) = await network.host("server").listen("", 80)
    stream = await network.host("client").connect("server", 80)
    assert stream.writes_directly is fast_path
    await listener.aclose()


async def test_the_former_names_of_responses_work(cluster: SimulatedCluster) -> None:
    seen: list[testing.StreamingResponse] = []
    with pytest.warns(DeprecationWarning, match="use on_response="):
        client = SimulatedClient(cluster.network.host("client"), "master", 8080, on_answer=seen.append)
    await client.get("/health")
    assert [response.status for response in seen] == [200]
    with pytest.warns(DeprecationWarning, match="responses"):
        assert cluster.answers is cluster.responses
