import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from headlong.server.fleet.prefix_affinity import PrefixAffinity
from headlong.server.fleet.prompt_pages import page_names, split_names

PAGE = 4


def _pages(tokens: Sequence[int]) -> list[bytes]:
    return split_names(page_names(tokens, PAGE, ""))


def _affinity(max_imbalance: int = 4, max_pages: int = 100, count: int = 3) -> PrefixAffinity:
    affinity = PrefixAffinity(max_imbalance, random.Random(0))
    affinity.keep({f"r{index}": max_pages for index in range(count)})
    return affinity


def test_the_longest_prefix_wins() -> None:
    affinity = _affinity()
    long, short = _pages(range(40)), _pages([*range(20), *range(100, 120)])
    affinity.remember("r1", long)
    affinity.remember("r2", short)
    loads = {"r0": 0, "r1": 2, "r2": 1}
    assert affinity.rank(_pages([*range(40), 7]), loads) == ["r1", "r2", "r0"]
    assert affinity.rank(_pages([*range(20), *range(100, 104)]), loads)[0] == "r2"
    # They hold the same five pages of this one.
    assert affinity.rank(_pages([*range(20), *range(200, 220)]), loads) == ["r2", "r1", "r0"]


def test_a_replica_that_is_too_busy_does_not_count_for_what_it_holds() -> None:
    affinity = _affinity(max_imbalance=4)
    pages = _pages(range(40))
    affinity.remember("r1", pages)
    assert affinity.rank(pages, {"r0": 0, "r1": 4, "r2": 3})[0] == "r1"
    assert affinity.rank(pages, {"r0": 0, "r1": 5, "r2": 3}) == ["r0", "r2", "r1"]


def test_a_new_prompt_goes_to_the_least_busy_one() -> None:
    affinity = _affinity()
    affinity.remember("r0", _pages(range(40)))
    assert affinity.rank(_pages(range(50, 90)), {"r0": 1, "r1": 2, "r2": 0}) == ["r2", "r0", "r1"]
    assert affinity.rank([], {"r0": 1, "r1": 2, "r2": 0}) == ["r2", "r0", "r1"]


def test_routers_that_know_nothing_of_each_other_agree() -> None:
    loads = {"r0": 0, "r1": 0, "r2": 0}
    first_choices = set[str]()
    for begin in range(40):
        pages = _pages(range(begin, begin + 8))
        one, other = PrefixAffinity(4), PrefixAffinity(4)
        assert one.rank(pages, loads) == other.rank(pages, loads)
        first_choices.add(one.rank(pages, loads)[0])
    assert first_choices == set(loads)


def test_prompts_without_a_page_are_spread() -> None:
    affinity = _affinity()
    loads = {"r0": 0, "r1": 0, "r2": 0}
    assert {affinity.rank([], loads)[0] for _ in range(60)} == set(loads)


def test_a_replica_that_died_holds_nothing_when_it_is_back() -> None:
    affinity = _affinity()
    pages = _pages(range(40))
    affinity.remember("r1", pages)
    affinity.forget("r1")
    affinity.remember("r1", pages)  # on its way when it died
    assert affinity.num_held("r1", pages) == 0
    affinity.keep({"r0": 100, "r1": 100})
    assert affinity.num_held("r1", pages) == 0
    affinity.remember("r0", pages)
    affinity.keep({"r1": 100})
    affinity.keep({"r0": 100, "r1": 100})
    assert affinity.num_held("r0", pages) == 0


def test_what_a_smaller_cache_cannot_hold_is_forgotten() -> None:
    affinity = _affinity(max_pages=10)
    pages = _pages(range(40))
    affinity.remember("r0", pages)
    assert affinity.num_held("r0", pages) == 10
    affinity.keep({"r0": 3})
    assert affinity.num_held("r0", pages) == 3


prompts = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=30)


@given(prompts, st.integers(0, 12))
def test_what_is_remembered_of_a_prompt_is_a_prefix(sent: list[list[int]], max_pages: int) -> None:
    affinity = _affinity(max_pages=max_pages, count=1)
    for tokens in sent:
        affinity.remember("r0", _pages(tokens))
        for other in sent:
            pages = _pages(other)
            # Each page by itself, against the search that looks at a few of them.
            held = [affinity.num_held("r0", pages[:end]) == end for end in range(1, len(pages) + 1)]
            assert held == sorted(held, reverse=True)
            assert affinity.num_held("r0", pages) == sum(held) <= max_pages
        pages = _pages(tokens)
        assert affinity.num_held("r0", pages) == min(len(pages), max_pages)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20), min_size=1),
    st.integers(0, 10),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40)), max_size=10),
)
def test_nobody_gets_far_more_than_the_least_busy_one(
    loads: dict[str, int], max_imbalance: int, sent: list[tuple[str, int]]
) -> None:
    affinity = PrefixAffinity(max_imbalance)
    affinity.keep(dict.fromkeys(loads, 100))
    for replica, length in sent:
        affinity.remember(replica, _pages(range(length)))
    ranked = affinity.rank(_pages(range(40)), loads)
    assert sorted(ranked) == sorted(loads)
    assert loads[ranked[0]] <= min(loads.values()) + max_imbalance


def _hit_rate(route: str, num_replicas: int) -> float:
    """Pages found, of those asked for, in replicas that hold what they were sent."""
    rng = random.Random(1)
    names = [f"r{index}" for index in range(num_replicas)]
    affinity = PrefixAffinity(4, rng)
    affinity.keep(dict.fromkeys(names, 1000))
    caches = {name: set[bytes]() for name in names}
    asked = found = 0
    for _ in range(400):
        group = rng.randrange(20)
        tokens = [*[group] * 80, *(rng.randrange(1000) for _ in range(8))]
        pages = _pages(tokens)
        # Earlier requests have ended, or a few have not.
        loads = {name: rng.randrange(5) for name in names}
        name = rng.choice(names) if route == "random" else affinity.rank(pages, loads)[0]
        affinity.remember(name, pages)
        asked += len(pages)
        found += sum(page in caches[name] for page in pages)
        caches[name].update(pages)
    return found / asked


def test_shared_prefixes_are_found_as_often_as_by_one_replica() -> None:
    one = _hit_rate("prefix", 1)
    assert _hit_rate("prefix", 4) == one
    assert _hit_rate("random", 4) < 0.9 * one
