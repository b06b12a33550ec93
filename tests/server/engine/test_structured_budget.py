import pytest

from headlong.server.engine.structured_budget import (
    FOLLOWING_S,
    FOLLOWING_S_PER_TOKEN,
    FollowingBudget,
)
from headlong.server.errors import InvalidRequestError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_only_what_is_spent_inside_counts() -> None:
    clock = Clock()
    budget = FollowingBudget(clock)
    clock.now_s += 100 * FOLLOWING_S
    with budget.spend():
        clock.now_s += 0.9 * FOLLOWING_S
    clock.now_s += 100 * FOLLOWING_S
    budget.check()
    with budget.spend():
        clock.now_s += 0.2 * FOLLOWING_S
    with pytest.raises(InvalidRequestError, match="too long to follow"):
        budget.check()


def test_each_token_allows_more() -> None:
    clock = Clock()
    budget = FollowingBudget(clock)
    for _ in range(1000):
        with budget.spend():
            clock.now_s += 0.9 * FOLLOWING_S_PER_TOKEN
        budget.check()
        budget.add_token()
    with budget.spend():
        clock.now_s += FOLLOWING_S + 101 * FOLLOWING_S_PER_TOKEN
    with pytest.raises(InvalidRequestError, match="1000 tokens"):
        budget.check()


def test_what_fails_inside_counts_too() -> None:
    clock = Clock()
    budget = FollowingBudget(clock)
    with pytest.raises(ZeroDivisionError), budget.spend():
        clock.now_s += 2 * FOLLOWING_S
        raise ZeroDivisionError
    with pytest.raises(InvalidRequestError):
        budget.check()
