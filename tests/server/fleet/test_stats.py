from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headlong.server.engine.status import CanaryStats, EngineStats, TierStats
from headlong.server.fleet.stats import MAX_GONE, FleetStats

A = EngineStats(
    steps_total=5, num_running=2, num_waiting=1, owned_blocks=(3, 4), cached_blocks=(1, 0),
    kv_bytes_owned=10, kv_bytes_full=30, prompt_tokens_total=100, generation_tokens_total=7,
    prefix_queries_total=100, prefix_hits_total=40, prefix_misses_total={"never_seen": 60},
    step_prefill_tokens=9, step_s=0.5, step_s_total=2.0, canary=CanaryStats(tokens=3, kl_sum=0.5),
    tiers=TierStats(
        host_bytes=64, disk_bytes=32, loaded_tokens=8,
        moved_seconds={**TierStats().moved_seconds, "to_host": 0.5},
    ),
)  # fmt: skip
B = EngineStats(
    steps_total=2, num_running=1, owned_blocks=(1, 1), cached_blocks=(2, 2), prompt_tokens_total=11,
    prefix_misses_total={"never_seen": 1, "evicted": 2}, step_decode_tokens=4,
    canary=CanaryStats(tokens=1, skipped={"busy": 1}),
    tiers=TierStats(
        host_bytes=16, recomputed_tokens=3, resumes={"swapped_in": 2}, lost_blocks={"unwritten": 1}
    ),
)  # fmt: skip


def test_the_sum_of_two() -> None:
    fleet = FleetStats()
    assert fleet.total() == EngineStats()
    assert fleet.update("a", A) == A
    both = fleet.update("b", B)
    assert both == EngineStats(
        steps_total=7, num_running=3, num_waiting=1, owned_blocks=(4, 5), cached_blocks=(3, 2),
        kv_bytes_owned=10, kv_bytes_full=30, prompt_tokens_total=111, generation_tokens_total=7,
        prefix_queries_total=100, prefix_hits_total=40,
        prefix_misses_total={"never_seen": 61, "evicted": 2}, step_s_total=2.0,
        canary=CanaryStats(tokens=4, kl_sum=0.5, skipped={"busy": 1}),
        tiers=TierStats(
            host_bytes=80, disk_bytes=32, loaded_tokens=8, recomputed_tokens=3,
            resumes={**TierStats().resumes, "swapped_in": 2},
            moved_seconds={**TierStats().moved_seconds, "to_host": 0.5},
            lost_blocks={**TierStats().lost_blocks, "unwritten": 1},
        ),
        # The last step is that of the one that reported.
        step_prefill_tokens=0, step_decode_tokens=4, step_s=0.0,
    )  # fmt: skip
    # Before its first report an engine knows nothing of its groups.
    assert fleet.update("c", EngineStats()).owned_blocks == (4, 5)


def test_what_was_said_first_may_come_last() -> None:
    fleet = FleetStats()
    fleet.update("a", A)
    assert fleet.update("a", replace(A, steps_total=4, num_running=9)) == A
    at_rest = replace(A, num_running=0)
    assert fleet.update("a", at_rest) == at_rest


def test_a_replica_that_went_leaves_its_counters() -> None:
    fleet = FleetStats()
    fleet.update("a", A)
    fleet.update("b", B)
    fleet.keep(["b"])
    total = fleet.total()
    assert list(fleet.replicas) == ["b"]
    assert (total.steps_total, total.prompt_tokens_total) == (7, 111)
    assert (total.num_running, total.owned_blocks) == (1, (1, 1))
    assert total.prefix_misses_total == {"never_seen": 61, "evicted": 2}
    # It was out of reach, and is not counted twice.
    assert fleet.update("a", A).steps_total == 7
    fleet.keep(["a", "b"])
    assert fleet.total().num_running == 3


names = st.sampled_from("abc")


@given(st.lists(st.one_of(st.tuples(names, st.integers(1, 5)), st.sets(names)), max_size=30))
def test_totals_never_fall(events: list[tuple[str, int] | set[str]]) -> None:
    fleet = FleetStats()
    steps = dict.fromkeys("abc", 0)
    for event in events:
        if isinstance(event, set):
            fleet.keep(event)
        else:
            name, count = event
            steps[name] += count
            fleet.update(name, EngineStats(steps_total=steps[name]))
        assert fleet.total().steps_total == sum(steps.values())


def test_the_memory_of_those_that_went_is_bounded() -> None:
    fleet = FleetStats()
    count = 3 * MAX_GONE
    for index in range(count):
        fleet.update(str(index), A)
        fleet.keep([])
    assert fleet.total().steps_total == count * A.steps_total
    assert fleet.total().canary.tokens == count * A.canary.tokens
    assert len(vars(fleet)["_gone"]) == MAX_GONE
