from hypothesis import given
from hypothesis import strategies as st

from headlong.server.fleet.request_counts import CHOSEN_S, RequestCounts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_counts_from_the_choice_to_the_end() -> None:
    clock = Clock()
    counts = RequestCounts(clock)
    counts.choose("a", "1")
    counts.choose("a", "2")
    assert (counts.count("a"), counts.count("b")) == (2, 0)
    # It was full, and another one took the request.
    counts.begin("b", "2")
    assert (counts.count("a"), counts.count("b")) == (1, 1)
    clock.now = 2 * CHOSEN_S
    assert (counts.count("a"), counts.count("b")) == (0, 1)
    counts.end("2")
    counts.end("2")
    counts.end("unknown")
    assert (counts.count("a"), counts.count("b")) == (0, 0)


def test_a_request_that_went_nowhere_may_be_chosen_for_again() -> None:
    clock = Clock()
    counts = RequestCounts(clock)
    counts.choose("a", "1")
    clock.now = 0.6 * CHOSEN_S
    counts.choose("b", "1")
    clock.now = 1.2 * CHOSEN_S
    assert (counts.count("a"), counts.count("b")) == (0, 1)
    clock.now = 1.7 * CHOSEN_S
    assert counts.count("b") == 0


steps = st.tuples(
    st.sampled_from(["choose", "begin", "end"]), st.sampled_from("abc"), st.sampled_from("1234")
)


@given(st.lists(steps, max_size=40))
def test_each_request_is_counted_once(events: list[tuple[str, str, str]]) -> None:
    counts = RequestCounts(Clock())
    where: dict[str, str] = {}
    for kind, replica, request_id in events:
        if kind == "end":
            counts.end(request_id)
            where.pop(request_id, None)
        else:
            getattr(counts, kind)(replica, request_id)
            where[request_id] = replica
        for each in "abc":
            assert counts.count(each) == list(where.values()).count(each)
