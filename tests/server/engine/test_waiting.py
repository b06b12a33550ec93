"""Whose turn it is: tenants by what they got, then priority, then arrival."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.server.engine.sequence import Sequence
from headlong.server.engine.waiting import WaitingQueue


def sequence(tenant: str = "", priority: int = 0) -> Sequence:
    request = SimpleNamespace(tenant=tenant, priority=priority)
    return cast(Sequence, SimpleNamespaceById(request=request))


class SimpleNamespaceById(SimpleNamespace):
    """Sequences are themselves and equal to nothing else."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def drain(queue: WaitingQueue, price: int = 1) -> list[Sequence]:
    order: list[Sequence] = []
    while (each := queue.next(())) is not None:
        queue.admit(each)
        queue.charge(each.request.tenant, price, 0)
        order.append(each)
    return order


def test_of_one_tenant_priority_comes_first_then_arrival() -> None:
    queue = WaitingQueue()
    late, early, urgent = sequence(priority=1), sequence(), sequence(priority=-5)
    second = sequence()
    for each in (late, early, urgent, second):
        queue.add(each)
    assert len(queue) == 4
    assert set(queue) == {late, early, urgent, second}
    assert drain(queue) == [urgent, early, second, late]
    assert len(queue) == 0


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    queue = WaitingQueue()
    flood = [sequence("flood") for _ in range(50)]
    for each in flood:
        queue.add(each)
    for each in flood[:10]:
        queue.admit(each)
        queue.charge("flood", 100, 0)
    guest = sequence("guest")
    queue.add(guest)
    # It starts no lower than those that are there, and at a tie is as good as any.
    assert drain(queue, 100).index(guest) <= 1


def test_a_priority_is_worth_nothing_against_another_tenant() -> None:
    queue = WaitingQueue()
    greedy = [sequence("greedy", priority=-100) for _ in range(4)]
    modest = [sequence("modest") for _ in range(4)]
    for each in greedy + modest:
        queue.add(each)
    tenants = [each.request.tenant for each in drain(queue)]
    assert Counter(tenants[:4]) == {"greedy": 2, "modest": 2}


def test_who_was_away_saved_nothing_up() -> None:
    queue = WaitingQueue()
    for _ in range(10):
        busy = sequence("busy")
        queue.add(busy)
        queue.admit(busy)
        queue.charge("busy", 1000, 0)
    queue.add(sequence("busy"))
    for _ in range(5):
        queue.add(sequence("away"))
    order = [each.request.tenant for each in drain(queue, 1000)]
    assert "busy" in order[:2]


def test_a_debt_is_forgiven_while_nobody_is_there() -> None:
    queue = WaitingQueue()
    for _ in range(10):
        old = sequence("old")
        queue.add(old)
        queue.admit(old)
        queue.charge("old", 1000, 0)
        queue.leave(old)
    for _ in range(20):
        queue.add(sequence("new"))
    queue.add(sequence("old"))
    order = [each.request.tenant for each in drain(queue, 1000)]
    assert "old" in order[:2]


def test_decoded_tokens_cost_more_than_prompt_tokens() -> None:
    queue = WaitingQueue()
    for tenant in ("reads", "writes"):
        queue.add(sequence(tenant))
        queue.add(sequence(tenant))
    for tenant, price in (("reads", (100, 0)), ("writes", (0, 100))):
        queue.charge(tenant, *price)
    assert drain(queue, 0)[0].request.tenant == "reads"


def test_those_passed_over_are_left_out_and_stay() -> None:
    queue = WaitingQueue()
    first, second = sequence(), sequence()
    queue.add(first)
    queue.add(second)
    assert queue.next([first]) is second
    assert queue.next([first, second]) is None
    assert len(queue) == 2


def test_preempted_ones_come_before_all_others() -> None:
    queue = WaitingQueue()
    old, new = sequence("a", priority=9), sequence("b", priority=-9)
    queue.add(old)
    queue.admit(old)
    queue.add(new)
    queue.put_back(old)
    assert drain(queue) == [old, new]


def test_what_does_not_wait_cannot_be_removed() -> None:
    queue = WaitingQueue()
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(sequence())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=30, max_size=120))
def test_backlogged_tenants_get_the_same_within_two_requests(arrivals: list[Any]) -> None:
    """The bound of virtual token counters: what two backlogged tenants got differs by less than
    twice the largest request."""
    queue = WaitingQueue()
    prices = {}
    for tenant, price in arrivals:
        each = sequence(tenant)
        prices[each] = price
        queue.add(each)
    got: Counter[str] = Counter()
    left = Counter(tenant for tenant, _ in arrivals)
    while (each := queue.next(())) is not None:
        queue.admit(each)
        tenant = each.request.tenant
        queue.charge(tenant, prices[each], 0)
        got[tenant] += prices[each]
        left[tenant] -= 1
        waiting = [name for name in left if left[name]]
        for one in waiting:
            for other in waiting:
                assert abs(got[one] - got[other]) < 2 * max(prices.values())
