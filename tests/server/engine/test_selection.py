"""Which tokens are decoded under a budget, and what the backend is told of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headlong.server.engine.packed_forward as packed_forward_module
import headlong.server.engine.sequence as sequence_module
from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL
from headlong.cache.sequence_cache import SequenceCache
from headlong.kernels.batch import UNBOUNDED, AttentionBatch, SelectionSettings
from headlong.server.engine.describe import describe
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.scheduler import ScheduledChunk
from headlong.server.engine.selection import SCORED_SEQUENCES, SelectionRule
from support.caches import build_cache
from support.engines import engine_maker, greedy, random_prompts
from support.tiny_models import VOCAB_SIZE

RULE = SelectionRule(
    budget_tokens=70, block_size=8, reuse_steps=4, min_similarity=None, num_places=9
)


def caches_of(lengths: Sequence[int]) -> tuple[KVCache, list[SequenceCache]]:
    cache = build_cache({"retrieval": RETRIEVAL}, [400], 8)
    sequences = [cache.begin() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        cache.extend(sequence, length)
    return cache, sequences


def test_a_rule_is_that_of_the_settings() -> None:
    assert SelectionRule.of(EngineConfig(model="m")) is None
    config = EngineConfig(
        model="m",
        retrieval_budget=1000,
        selection_reuse_steps=4,
        selection_min_similarity=0.8,
        max_num_seqs=5,
    )
    rule = SelectionRule.of(config)
    assert rule is not None
    assert rule == SelectionRule(1000, 16, 4, 0.8, 6)
    assert rule.settings(5000) == SelectionSettings(1000, 6, 5000, 0.8)
    assert rule.exact_tokens == 992
    assert [rule.dense_tokens(count) for count in (1, 992, 993)] == [992, 992, 993]
    alone = SelectionRule.of(EngineConfig(model="m", retrieval_budget=1000, max_num_seqs=1))
    assert alone is not None
    assert alone.num_places == 1 + SCORED_SEQUENCES


def test_only_a_generated_token_alone_has_a_budget() -> None:
    _, sequences = caches_of([101, 100, 100, 108])
    found = RULE.batch(sequences, [1, 1, 8, 8], [100, 100, 90, 100])
    assert found.budgets.tolist() == [70, UNBOUNDED, UNBOUNDED, UNBOUNDED]
    assert found.budgets.dtype == found.places.dtype == torch.int32
    assert found.places.tolist() == [sequences[0].place, 0, 0, 0]
    assert found.renews.dtype == torch.bool


def test_a_choice_is_made_at_the_first_token_and_again_in_every_block() -> None:
    lengths = list(range(102, 114))
    _, sequences = caches_of(lengths)
    rule = SelectionRule(70, 8, 3, None, 20)
    found = rule.batch(sequences, [1] * len(lengths), [101] * len(lengths))
    # Token 101 is the first, 104 begins a block; of a block 0, 3 and 6 choose.
    chosen = [
        length - 1 for length, renews in zip(lengths, found.renews.tolist(), strict=True) if renews
    ]
    assert chosen == [101, 102, 104, 107, 110, 112]


@given(st.lists(st.sampled_from(["begin", "fork", "free"]), max_size=40))
def test_no_two_sequences_have_a_place(steps: list[str]) -> None:
    cache, live = caches_of([8])
    most = 1
    for index, step in enumerate(steps):
        if step == "begin" or not live:
            live.append(cache.begin())
        elif step == "fork":
            live.append(cache.fork(live[index % len(live)]))
        else:
            cache.free(live.pop(index % len(live)))
        most = max(most, len(live))
        places = [sequence.place for sequence in live]
        assert len(set(places)) == len(places)
        assert all(1 <= place <= most for place in places)
        cache.check_integrity()


@pytest.fixture
def build(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Engine]:
    return engine_maker(
        tiny_model("qwen3"),
        tmp_path,
        block_size=8,
        retrieval_budget=70,
        selection_reuse_steps=4,
        max_model_len=256,
    )


class Watched:
    """What the model was given, step by step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[AttentionBatch, list[tuple[str, int, int, int]]]] = []
        build_batch = packed_forward_module.PackedForward._batch

        def watched(
            forward: packed_forward_module.PackedForward,
            chunks: list[ScheduledChunk],
        ) -> AttentionBatch:
            batch = build_batch(forward, chunks)
            rows = [
                (
                    f"{chunk.sequence.request_id}/{chunk.sequence.index}",
                    chunk.sequence.num_computed_tokens,
                    chunk.num_tokens,
                    chunk.sequence.num_prompt_tokens,
                )
                for chunk in chunks
            ]
            self.steps.append((batch, rows))
            return batch

        monkeypatch.setattr(packed_forward_module.PackedForward, "_batch", watched)

    def check(self, exact_tokens: int) -> Counter[str]:
        """Every token of every step has what the rule says; how often each case came."""
        seen: Counter[str] = Counter()
        chosen: dict[str, int] = {}
        for batch, rows in self.steps:
            selection = batch.selection
            assert selection is not None
            used = selection.places[selection.budgets < UNBOUNDED].tolist()
            assert len(set(used)) == len(used)
            assert 0 not in used
            for seq, (name, start, count, prompt) in enumerate(rows):
                place = int(selection.places[seq])
                if selection.budgets[seq] == UNBOUNDED:
                    assert start + count <= max(prompt, exact_tokens), name
                    seen["dense"] += 1
                    continue
                assert (count, start >= prompt) == (1, True), name
                if selection.renews[seq]:
                    chosen[name] = place
                    seen["renewed"] += 1
                elif start >= exact_tokens:
                    # What it reuses was chosen in the same place.
                    assert chosen[name] == place
                    seen["reused"] += 1
        return seen


def serve(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            name = f"{output.request_id}/{output.index}"
            tokens.setdefault(name, []).extend(output.token_ids)
        engine.cache.check_integrity()
    return tokens


def test_every_token_of_a_crowd_gets_what_the_rule_says(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    roomy = build()
    small = build(
        kv_cache_memory_bytes=roomy.plan.full_sequence_bytes(200) * 3,
        max_model_len=200,
        max_num_batched_tokens=64,
    )
    watched = Watched(small, monkeypatch)
    prompts = random_prompts((100, 30, 120, 64, 61, 99), VOCAB_SIZE, seed=2)
    requests = [
        EngineRequest(str(index), prompt, greedy(70), n=1 + index % 2, asked_max_tokens=False)
        for index, prompt in enumerate(prompts)
    ]
    served = serve(small, requests)
    assert len(served) == 9
    assert small.scheduler.num_preemptions > 0
    seen = watched.check(exact_tokens=64)
    assert min(seen[case] for case in ("dense", "renewed", "reused")) > 20
    # Some came back for what they had generated, a token a step.
    computed = Counter(
        (name, start)
        for _, rows in watched.steps
        for name, start, _, prompt in rows
        if start >= max(prompt, 64)
    )
    assert max(computed.values()) > 1


def test_a_prompt_is_never_cut_for_a_budget(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    watched = Watched(engine, monkeypatch)
    serve(engine, [EngineRequest("r", random_prompts((200,), VOCAB_SIZE)[0], greedy(2))])
    assert [count for _, rows in watched.steps for _, _, count, _ in rows] == [200, 1]
    assert watched.steps[0][0].selection is not None


def test_without_a_budget_nothing_is_said(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(retrieval_budget=None, selection_reuse_steps=1)
    watched = Watched(engine, monkeypatch)
    serve(engine, [EngineRequest("r", [5] * 90, greedy(2))])
    assert [batch.selection for batch, _ in watched.steps] == [None, None]
    assert not any("page selection" in line for line in describe(engine))


def test_what_was_generated_under_a_budget_is_found_by_the_same_request_alone(
    build: Callable[..., Engine],
) -> None:
    engine = build()
    (prompt,) = random_prompts((100,), VOCAB_SIZE, seed=6)
    request = EngineRequest("r", prompt, greedy(40))
    (answer,) = serve(engine, [request]).values()
    # Preempted, it would find all its full blocks again.
    again = engine._requests._planner.plan(request)
    again.keys.extend(prompt + answer)
    assert engine.cache.match(again.keys, len(prompt + answer)).num_tokens == 136
    # Who goes on from its answer finds what its prompt filled.
    longer = engine._requests._planner.plan(EngineRequest("s", prompt + answer + [5], greedy(1)))
    longer.keys.extend(prompt + answer + [5])
    assert engine.cache.match(longer.keys, 141).num_tokens == 96


def test_answers_within_the_budget_are_shared(build: Callable[..., Engine]) -> None:
    engine = build()
    (prompt,) = random_prompts((20,), VOCAB_SIZE, seed=6)
    (answer,) = serve(engine, [EngineRequest("r", prompt, greedy(80))]).values()
    longer = engine._requests._planner.plan(EngineRequest("s", prompt + answer + [5], greedy(1)))
    longer.keys.extend(prompt + answer + [5])
    assert engine.cache.match(longer.keys, 101).num_tokens == 64


def test_the_operator_is_told_what_is_stored_and_read(build: Callable[..., Engine]) -> None:
    engine = build(
        selection_min_similarity=0.9,
        compensation="on",
        kv_cache_dtype="retrieval=int4,streaming=int8",
    )
    assert describe(engine)[1:4] == [
        "KV cache format: retrieval in int4, streaming in int8",
        "compensation: from layer 1 on, streaming heads keep one entry for all tokens that they "
        "drop",
        "page selection: a generated token reads at most 70 tokens in a retrieval head, chosen for "
        "4 tokens at once, anew where the query's cosine is below 0.9",
    ]
