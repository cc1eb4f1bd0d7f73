"""The belief about a prompt cache: always the beginning of a prompt, bounded, corrected by what answers report."""

from __future__ import annotations

from hypothesis import given, strategies as st

from trio_cluster.routing.prefix_cache import PrefixCache
from trio_cluster.routing.prompt import ENDS, Prompt


def prompt(*texts: str, size: int = 0, conversation: str = "") -> Prompt:
    """Return a prompt with one block for each text."""
    blocks: list[int] = []
    for text in texts:
        blocks.append(hash((blocks[-1] if blocks else 0, text)))
    return Prompt(size or (ENDS[len(blocks) - 1] if blocks else 0), tuple(blocks), conversation)


def test_the_common_beginning_is_cached() -> None:
    cache = PrefixCache()
    assert cache.hit(prompt("a", "b")) == 0
    cache.add(prompt("a", "b", "c", "d"))
    for texts, blocks in (("a", 1), ("ab", 2), ("abxd", 2), ("abcdef", 4), ("xbcd", 0)):
        assert cache.hit(prompt(*texts)) == (ENDS[blocks - 1] if blocks else 0), texts


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=90), max_size=30))
def test_a_block_never_outlives_those_before_it_and_the_size_is_bounded(prompts: list[list[str]]) -> None:
    cache = PrefixCache(20_000)
    for texts in prompts:
        cache.add(prompt(*texts))
        kept = set(cache._blocks)
        assert sum(cache._blocks.values()) == cache._size <= cache.capacity
        for others in prompts:
            blocks = prompt(*others).blocks
            known = [block in kept for block in blocks]
            assert known == sorted(known, reverse=True)
            hit = cache.hit(prompt(*others))
            assert hit == (ENDS[sum(known) - 1] if any(known) else 0)


def test_what_was_used_longest_ago_goes_first_and_of_a_prompt_its_end() -> None:
    cache = PrefixCache(16 * 1024)
    shared = [f"s{number}" for number in range(10)]
    for number in range(20):
        cache.add(prompt(*shared, *(f"{number}/{block}" for block in range(20))))
    assert cache.hit(prompt(*shared)) == ENDS[9]
    assert cache.hit(prompt(*shared, "0/0")) == ENDS[9]
    assert cache.hit(prompt(*shared, "19/0")) == ENDS[10]


def test_a_conversation_is_remembered_by_its_name() -> None:
    cache = PrefixCache()
    cache.add(prompt(size=5000, conversation="c"))
    assert cache.hit(prompt(size=9000, conversation="c")) == 5000
    assert cache.hit(prompt(size=300, conversation="c")) == 300
    assert cache.hit(prompt(size=9000, conversation="d")) == 0
    assert cache.hit(prompt(size=9000)) == 0


def test_the_names_of_conversations_are_bounded() -> None:
    cache = PrefixCache()
    for number in range(5000):
        cache.add(prompt(size=10, conversation=str(number)))
    assert cache.hit(prompt(size=10, conversation="0")) == 0
    assert cache.hit(prompt(size=10, conversation="4999")) == 10


def test_less_than_expected_makes_it_smaller_and_as_much_lets_it_grow_up_to_what_was_declared() -> None:
    cache = PrefixCache(400_000)
    for number in range(40):
        cache.add(prompt(*(f"{number}/{block}" for block in range(20))))
    full = cache._size
    cache.correct(10_000, 9_000)
    assert cache.capacity == 400_000
    cache.correct(10_000, 1_000)
    assert cache._size <= cache.capacity == int(full * 0.75)
    shrunk = cache.capacity
    cache.correct(10_000, 10_000)
    assert shrunk < cache.capacity < 1.1 * shrunk
    for _ in range(1000):
        cache.correct(10_000, 10_000)
    assert cache.capacity == 400_000
    cache.correct(0, 0)
    for _ in range(1000):
        cache.correct(10_000, 0)
    assert cache.capacity == 16 * 1024
