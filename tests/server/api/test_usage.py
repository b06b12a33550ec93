"""What a request is told of its cost, and what it is not."""

import pytest

from headlong.server.api.usage import hide_salts

PATHS = ["/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("path", PATHS)
def test_usage_tells_of_the_cache(post, engine, path):
    engine.cached = 1
    usage = post(path).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["kv_cache"] == {"peak_bytes": 100, "full_bytes": 300}
    assert "cache_misses" not in usage


def test_a_prompt_counts_once_and_every_completion_counts(post, engine):
    engine.cached = 2
    engine.misses = {"never_seen": 1, "partial_block": 2}
    usage = post(PATHS[0], prompt=["abc", "abcde"], n=3, cache_report=True).json()["usage"]
    assert usage["prompt_tokens"] == 8
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == 32
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert usage["kv_cache"] == {"peak_bytes": 2 * (100 + 101 + 102), "full_bytes": 1800}
    assert usage["cache_misses"] == {"never_seen": 2, "partial_block": 4}


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_reports_at_its_end(post, engine, events, path):
    engine.misses = {"window_evicted": 3}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = events(
        post(path, stream=True, stream_options=options, cache_report=True).text
    )
    assert last["usage"]["kv_cache"] == {"peak_bytes": 100, "full_bytes": 300}
    assert last["usage"]["cache_misses"] == {"window_evicted": 3}
    # Before its end nobody knows what a completion will have held.
    assert not any("kv_cache" in chunk["usage"] for chunk in chunks[:-2])
    assert "prompt_tokens_details" in chunks[0]["usage"]


def test_nobody_learns_that_a_prefix_lies_under_another_salt(post, engine):
    engine.misses = {"salt": 3, "partial_block": 1}
    told = post(PATHS[0], cache_report=True, cache_salt="mine")
    assert told.json()["usage"]["cache_misses"] == {"never_seen": 3, "partial_block": 1}
    assert "salt" not in told.text


@pytest.mark.parametrize(
    ("misses", "shown"),
    [
        ({}, {}),
        ({"never_seen": 2}, {"never_seen": 2}),
        ({"salt": 2, "never_seen": 3}, {"never_seen": 5}),
        ({"salt": 0}, {"never_seen": 0}),
    ],
)
def test_salts_are_hidden(misses, shown):
    assert hide_salts(misses) == shown
