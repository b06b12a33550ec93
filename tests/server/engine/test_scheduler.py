"""What a step does: who runs, how much of each, and who waits."""

from collections.abc import Callable
from pathlib import Path

import pytest

import headlong.server.engine.sequence as sequence_module
from headlong.server.engine.engine import Engine
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.scheduler import MAX_FETCHING, MAX_PASSED, SCORED_TOKENS
from headlong.server.engine.sequence import Sequence
from support.engines import engine_maker, greedy, random_prompts, run
from support.tiny_models import VOCAB_SIZE

LONG, *SHORT = random_prompts([400, 8, 8, 8, 8], VOCAB_SIZE, seed=5)


@pytest.fixture
def build(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Engine]:
    return engine_maker(
        tiny_model("qwen3"),
        tmp_path,
        max_model_len=512,
        max_num_batched_tokens=64,
        chunked_prefill_size=16,
        block_size=8,
    )


def add(engine: Engine, name: str, prompt: list[int], tokens: int = 4, **options: object) -> None:
    engine.add_request(EngineRequest(name, prompt, greedy(tokens), **options))  # type: ignore[arg-type]


def finish(engine: Engine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
        engine.cache.check_integrity()
    return outputs


def first_tokens(outputs: list[RequestOutput]) -> list[str]:
    """Requests in the order of their first tokens."""
    names = [each.request_id for each in outputs if each.token_ids]
    return list(dict.fromkeys(names))


def test_short_prompts_pass_a_long_one(build: Callable[..., Engine]) -> None:
    engine = build()
    add(engine, "long", LONG)
    engine.step()
    for index, prompt in enumerate(SHORT):
        add(engine, f"short{index}", prompt)
    order = first_tokens(finish(engine))
    assert order[-1] == "long"
    assert len(order) == 5


def test_a_long_prompt_goes_on_whatever_passes_it(build: Callable[..., Engine]) -> None:
    """New short prompts in every step: the long one still gets a part of each."""
    engine = build()
    add(engine, "long", LONG, 1)
    steps = 0
    done = False
    while not done:
        add(engine, f"short{steps}", SHORT[0][:4] + [10 + steps % 90] * 4, 1)
        done = any(each.request_id == "long" and each.token_ids for each in engine.step())
        steps += 1
        assert steps < 200
    assert steps <= len(LONG) // 4 + 2


def test_chunks_shrink_while_others_decode(build: Callable[..., Engine]) -> None:
    engine = build()
    add(engine, "alone", LONG[:128], 200)
    engine.step()
    assert engine.stats().step_prefill_tokens == 64
    engine.step()
    add(engine, "long", LONG)
    seen: list[tuple[int, int]] = []
    for _ in range(10):
        outputs = engine.step()
        stats = engine.stats()
        seen.append((stats.step_decode_tokens, stats.step_prefill_tokens))
        assert [each.request_id for each in outputs if each.token_ids] == ["alone"]
    assert set(seen) == {(1, 16)}


def test_every_decode_runs_in_every_step(build: Callable[..., Engine]) -> None:
    engine = build(max_num_seqs=8)
    for index, prompt in enumerate(SHORT):
        add(engine, f"short{index}", prompt, 60)
    while engine.stats().step_decode_tokens < len(SHORT):
        engine.step()
    add(engine, "long", LONG)
    for _ in range(20):
        names = [each.request_id for each in engine.step() if each.token_ids]
        assert sorted(names)[-len(SHORT) :] == [f"short{index}" for index in range(len(SHORT))]


def test_what_is_asked_for_is_reserved(build: Callable[..., Engine]) -> None:
    """Two that would fit now, but not at their ends: the second waits, and nobody is preempted."""
    own = build(max_model_len=128).plan.sequence_bytes(128)
    engine = build(max_model_len=128, kv_cache_memory_bytes=own * 3 // 2, max_num_seqs=4)
    add(engine, "first", SHORT[0], 110)
    add(engine, "second", SHORT[1], 110)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    outputs = finish(engine)
    assert engine.stats().preemptions_total == 0
    done = [each.request_id for each in outputs if each.finish_reason]
    assert done == ["first", "second"]


def test_a_small_request_passes_one_for_which_there_is_no_room(
    build: Callable[..., Engine],
) -> None:
    own = build(max_model_len=128).plan.sequence_bytes(128)
    engine = build(max_model_len=128, kv_cache_memory_bytes=own * 3 // 2, max_num_seqs=4)
    add(engine, "first", SHORT[0], 110)
    engine.step()
    add(engine, "large", SHORT[1], 110)
    add(engine, "small", SHORT[2], 4)
    order = first_tokens(finish(engine))
    assert order == ["first", "small", "large"]


def test_it_is_not_passed_for_ever(build: Callable[..., Engine]) -> None:
    own = build(max_model_len=128).plan.sequence_bytes(128)
    engine = build(max_model_len=128, kv_cache_memory_bytes=own * 3 // 2, max_num_seqs=4)
    add(engine, "first", SHORT[0], 110)
    engine.step()
    add(engine, "large", SHORT[1], 110)
    added = passed = 0
    large_started = False
    while not large_started:
        add(engine, f"small{added}", SHORT[2], 1)
        added += 1
        for output in engine.step():
            passed += output.request_id.startswith("small") and bool(output.token_ids)
            large_started |= output.request_id == "large"
    # Beside it, not past it, as many may come as run at once.
    assert MAX_PASSED <= passed < MAX_PASSED + 4
    finish(engine)


def test_the_least_important_loses_its_blocks(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    own = build(max_model_len=128).plan.sequence_bytes(128)
    engine = build(max_model_len=128, kv_cache_memory_bytes=own * 3 // 2, max_num_seqs=4)
    expected = run(build(max_model_len=128), [SHORT[0], SHORT[1]], greedy(110))
    add(engine, "unimportant", SHORT[0], 110, priority=5, asked_max_tokens=False)
    add(engine, "important", SHORT[1], 110, priority=-5, asked_max_tokens=False)
    outputs = finish(engine)
    assert engine.stats().preemptions_total > 0
    done = [each.request_id for each in outputs if each.finish_reason]
    assert done == ["important", "unimportant"]
    for name, tokens in zip(("unimportant", "important"), expected, strict=True):
        got = [token for each in outputs if each.request_id == name for token in each.token_ids]
        assert got == tokens


def test_a_tenant_with_a_flood_does_not_keep_another_waiting(build: Callable[..., Engine]) -> None:
    engine = build(max_num_seqs=2)
    for index in range(20):
        add(engine, f"flood{index}", SHORT[index % 4], 6, tenant="flood")
    engine.step()
    add(engine, "guest", SHORT[0], 6, tenant="guest")
    order = first_tokens(finish(engine))
    assert order.index("guest") <= 3


def test_a_priority_takes_nothing_from_another_tenant(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    own = build(max_model_len=128).plan.sequence_bytes(128)
    engine = build(max_model_len=128, kv_cache_memory_bytes=own * 3 // 2, max_num_seqs=4)
    options = {"asked_max_tokens": False}
    add(engine, "modest", SHORT[0], 110, tenant="modest", **options)
    add(engine, "greedy", SHORT[1], 110, tenant="greedy", priority=-9, **options)
    outputs = finish(engine)
    assert engine.stats().preemptions_total > 0
    done = [each.request_id for each in outputs if each.finish_reason]
    assert done == ["modest", "greedy"]


@pytest.mark.parametrize("block_size", [8, 16])
def test_one_that_lost_its_blocks_goes_on_alone(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """At a block's edge it finds all but its newest token again, and nobody else runs."""
    monkeypatch.setattr(sequence_module, "UNASKED_COMPLETION_TOKENS", 1)
    engine = build(block_size=block_size)
    expected = run(engine, [SHORT[0]], greedy(60))[0]
    add(engine, "r", SHORT[0], 60, asked_max_tokens=False)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
        (sequence,) = engine.scheduler.running or [None]
        if sequence is not None and len(sequence.token_ids) % block_size == 1:
            engine.scheduler._preempt(sequence)
    assert [token for each in outputs for token in each.token_ids] == expected
    assert engine.stats().preemptions_total > 2


def test_the_first_token_tells_of_the_chunks(build: Callable[..., Engine]) -> None:
    engine = build(max_num_batched_tokens=64)
    add(engine, "r", LONG)
    outputs = finish(engine)
    (first,) = [each for each in outputs if each.prefill_chunks]
    assert first.num_completion_tokens == 1
    told = first.prefill_chunks
    assert [each.num_tokens for each in told] == [64] * 6 + [16]
    assert all(each.num_steps == 1 for each in told)
    times = [each.ended for each in told]
    assert times == sorted(times)


def test_chunks_that_are_computed_again_are_told_again(build: Callable[..., Engine]) -> None:
    engine = build(enable_prefix_caching=False)
    add(engine, "r", SHORT[0], 6)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
        (sequence,) = engine.scheduler.running or [None]
        if sequence is not None and sequence.num_output_tokens == 3 and not sequence.num_passed:
            engine.scheduler._preempt(sequence)
            sequence.num_passed = 1
    told = [chunk.num_tokens for each in outputs for chunk in each.prefill_chunks]
    assert told == [len(SHORT[0]), len(SHORT[0]) + 3]


def test_the_chunks_of_a_very_long_prompt_are_bounded(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_module, "MAX_PREFILL_CHUNKS", 3)
    engine = build(max_num_batched_tokens=64)
    add(engine, "r", LONG)
    (told,) = filter(None, (each.prefill_chunks for each in finish(engine)))
    assert [(each.num_tokens, each.num_steps) for each in told] == [(64, 1), (64, 1), (272, 5)]


def test_prompts_that_are_scored_leave_the_step_to_others(build: Callable[..., Engine]) -> None:
    engine = build(max_num_batched_tokens=512)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for index in range(3):
        engine.add_request(EngineRequest(f"scored{index}", LONG, params))
    engine.step()
    assert engine.stats().step_prefill_tokens == SCORED_TOKENS
    add(engine, "plain", LONG[::-1])
    engine.step()
    assert engine.stats().step_prefill_tokens == 512
    finish(engine)


def test_completions_of_one_prompt_wait_until_all_of_them_may_run(
    build: Callable[..., Engine],
) -> None:
    engine = build(max_num_seqs=4)
    add(engine, "one", SHORT[0], 30)
    engine.step()
    add(engine, "four", SHORT[1], 4, n=4)
    add(engine, "three", SHORT[2], 4, n=3)
    outputs = finish(engine)
    assert first_tokens(outputs) == ["one", "three", "four"]
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_a_step_looks_at_few_of_those_that_wait_for_the_disk(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    asked: list[str] = []

    def waits(sequence: Sequence) -> bool:
        asked.append(sequence.request_id)
        return True

    monkeypatch.setattr(engine.scheduler.prefixes, "look_ahead", lambda waiting: None)
    monkeypatch.setattr(engine.scheduler.prefixes, "awaits_disk", waits)
    for index in range(2 * MAX_FETCHING):
        add(engine, str(index), SHORT[0])
    engine.step()
    assert asked == [str(index) for index in range(MAX_FETCHING)]
    monkeypatch.undo()
    add(engine, "last", SHORT[1])
    assert len(first_tokens(finish(engine))) == 2 * MAX_FETCHING + 1
