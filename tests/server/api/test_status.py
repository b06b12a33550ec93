import pytest

from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.status import CanaryStats, EngineStats, TierStats
from headlong.server.telemetry.joined_observer import JoinedObserver
from headlong.server.telemetry.observer import EndedCompletion, EndedRequest
from headlong.server.telemetry.recent import (
    LATENCY_WINDOW_S,
    MAX_ITLS,
    MAX_TTFTS,
    RATE_WINDOW_S,
    RecentFigures,
    percentile,
)
from support.observer import Recorder

STATS = EngineStats(
    steps_total=12,
    num_running=2,
    num_waiting=3,
    owned_blocks=(10, 5),
    cached_blocks=(20, 1),
    kv_bytes_owned=7680,
    kv_bytes_full=10_000,
    prompt_tokens_total=400,
    generation_tokens_total=50,
    preemptions_total=1,
    prefix_queries_total=400,
    prefix_hits_total=100,
    prefix_misses_total={"never_seen": 250, "salt": 30, "evicted": 20},
    canary=CanaryStats(requests=2, tokens=8, kl_sum=0.4, top1_agreed=6, skipped={"busy": 1}),
    tiers=TierStats(
        host_bytes=512, disk_bytes=256, loaded_tokens=9, recomputed_tokens=4,
        resumes={"swapped_in": 1}, lost_blocks={"unreadable": 2},
    ),
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> RecentFigures:
    return RecentFigures(clock)


def step(recent, prompt_tokens, generation_tokens):
    recent.on_step(
        EngineStats(prompt_tokens_total=prompt_tokens, generation_tokens_total=generation_tokens)
    )


def test_status_before_any_work(client):
    response = client.get("/status")
    assert response.status_code == 200
    status = response.json()
    assert status["models"] == ["fake/model", "alias"]
    assert (status["state"], status["device"], status["dtype"]) == ("ready", "cpu", "float32")
    assert (status["max_model_len"], status["max_num_seqs"], status["block_size"]) == (64, 8, 16)
    assert status["head_groups"] == [[0, 1]]
    assert status["groups"] == [
        {
            "name": "retrieval", "sink_size": 0, "window_size": None, "num_heads": 1,
            "num_blocks": 100, "owned_blocks": 0, "cached_blocks": 0, "free_blocks": 100,
            "block_bytes": 512,
        },
        {
            "name": "streaming", "sink_size": 4, "window_size": 16, "num_heads": 1,
            "num_blocks": 50, "owned_blocks": 0, "cached_blocks": 0, "free_blocks": 50,
            "block_bytes": 512,
        },
    ]  # fmt: skip
    assert status["latency"] == {
        "num_first_tokens": 0, "ttft_p50_s": None, "ttft_p90_s": None, "itl_p50_s": None,
    }  # fmt: skip
    assert status["prefix_cache"]["hit_rate"] is None
    assert status["canary"]["mean_kl"] is status["canary"]["top1_agreement"] is None
    assert status["has_chat_template"] is True
    assert status["uptime_s"] >= 0


def test_status_of_a_busy_engine(client, engine):
    engine.stats = STATS
    engine.observer.on_step(STATS)
    engine.observer.on_first_token(0.5, 0.4)
    engine.observer.on_token(0.02)
    status = client.get("/status").json()
    assert (status["running"], status["waiting"]) == (2, 3)
    assert (status["steps_total"], status["preemptions_total"]) == (12, 1)
    blocks = [
        (each["owned_blocks"], each["cached_blocks"], each["free_blocks"])
        for each in status["groups"]
    ]
    assert blocks == [(10, 20, 70), (5, 1, 44)]
    assert status["kv_cache"] == {"owned_bytes": 7680, "full_bytes": 10_000, "saved_bytes": 2320}
    assert status["latency"] == {
        "num_first_tokens": 1, "ttft_p50_s": 0.5, "ttft_p90_s": 0.5, "itl_p50_s": 0.02,
    }  # fmt: skip
    assert status["prefix_cache"]["hit_rate"] == 0.25
    assert status["canary"] == {
        "requests": 2, "tokens": 8, "mean_kl": 0.05, "top1_agreement": 0.75,
        "skipped": {"busy": 1},
    }  # fmt: skip
    assert status["tiers"] == {
        "host_bytes": 512, "disk_bytes": 256, "loaded_tokens_total": 9,
        "recomputed_tokens_total": 4, "resumes_total": {"swapped_in": 1},
        "lost_blocks_total": {"unreadable": 2},
    }  # fmt: skip
    throughput = status["throughput"]
    assert (throughput["prompt_tokens_total"], throughput["generation_tokens_total"]) == (400, 50)
    assert throughput["prompt_tokens_per_s"] == 8 * throughput["generation_tokens_per_s"] > 0


def test_salts_are_not_told(client, engine):
    engine.stats = STATS
    misses = client.get("/status").json()["prefix_cache"]["misses_total"]
    assert misses == {"never_seen": 280, "evicted": 20}


def test_a_server_that_takes_no_requests_still_tells_its_status(client, engine):
    engine.is_draining = True
    assert client.get("/status").json()["state"] == "draining"
    engine.is_draining = engine.is_alive = False
    assert client.get("/status").json()["state"] == "dead"


def test_a_model_without_a_chat_template(client, engine):
    engine.tokenizer.chat_template = None
    assert client.get("/status").json()["has_chat_template"] is False


def test_openapi_describes_the_status(client):
    spec = client.get("/openapi.json").json()
    content = spec["paths"]["/status"]["get"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Status"}
    status = client.get("/status").json()
    assert set(spec["components"]["schemas"]["Status"]["properties"]) == set(status)


def test_rates_are_of_the_last_ten_seconds(recent, clock):
    for second in range(1, 31):
        clock.now += 1.0
        step(recent, 100 * second, 10 * second)
    rates = recent.rates()
    assert (rates.prompt_tokens, rates.generation_tokens) == (100.0, 10.0)
    clock.now += RATE_WINDOW_S / 2
    assert recent.rates().generation_tokens == 5.0
    clock.now += RATE_WINDOW_S / 2
    assert recent.rates().generation_tokens == 0.0


@pytest.mark.parametrize("interval_s", [0.001, 0.013, 0.24, 0.26, 1.7])
def test_rates_do_not_depend_on_how_long_steps_take(recent, clock, interval_s):
    for number in range(1, int(25 / interval_s)):
        clock.now += interval_s
        step(recent, 0, number)
    # To the accuracy of a sample, and of a step.
    assert recent.rates().generation_tokens * interval_s == pytest.approx(1, rel=0.2)


def test_what_was_before_a_pause_is_not_counted_after_it(recent, clock):
    for number in range(1, 100):
        clock.now += 0.01
        step(recent, 0, number)
    clock.now += 60
    step(recent, 0, 104)
    assert recent.rates().generation_tokens == pytest.approx(5 / RATE_WINDOW_S)


def test_the_first_second_is_a_whole_one(recent, clock):
    clock.now += 0.01
    step(recent, 0, 3)
    assert recent.rates().generation_tokens == 3.0


def test_latencies_are_of_the_last_minute(recent, clock):
    for number in range(1, 11):
        recent.on_first_token(number / 10, 0.0)
        recent.on_token(number / 100)
    latencies = recent.latencies()
    assert latencies.num_first_tokens == 10
    assert (latencies.ttft_p50_s, latencies.ttft_p90_s, latencies.itl_p50_s) == (0.5, 0.9, 0.05)
    clock.now += LATENCY_WINDOW_S + 1
    recent.on_first_token(7.0, 0.0)
    latencies = recent.latencies()
    assert (latencies.num_first_tokens, latencies.ttft_p50_s, latencies.itl_p50_s) == (1, 7.0, None)


def test_memory_is_bounded(recent):
    for _ in range(3 * MAX_ITLS):
        recent.on_first_token(1.0, 0.0)
        recent.on_token(1.0)
    assert recent.latencies().num_first_tokens == MAX_TTFTS
    assert len(recent._itls) == MAX_ITLS


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3.0], 1, 3.0), ([3.0], 100, 3.0), ([1.0, 2.0], 50, 1.0),
     ([1.0, 2.0], 51, 2.0), ([1.0, 2.0, 3.0], 90, 3.0)],
)  # fmt: skip
def test_percentile(values, percent, expected):
    assert percentile(values, percent) == expected


def test_joined_observers_are_all_told_everything():
    recorders = [Recorder(), Recorder()]
    joined = JoinedObserver(recorders)
    joined.on_step(EngineStats(steps_total=4))
    joined.on_started(0.5)
    joined.on_first_token(0.6, 0.1)
    joined.on_token(0.1)
    joined.on_finished("stop", 7, 2, 1.0, 0.1)
    request = EngineRequest("r", [1], SamplingParams())
    end = EndedCompletion(
        reason="stop",
        num_tokens=0,
        first_token=None,
        last_token=None,
        ended=request.arrived,
    )
    record = EndedRequest(
        request=request,
        started=None,
        prefill_chunks=(),
        num_cached_tokens=0,
        cache_misses={},
        completions=(end,),
    )
    joined.on_ended(record)
    for recorder in recorders:
        assert recorder.steps == [4]
        assert recorder.started == [0.5]
        assert recorder.finished == [("stop", 7, 2)]
        assert recorder.names == ["started", "first_token", "token", "finished"]
        assert recorder.records == [record]
