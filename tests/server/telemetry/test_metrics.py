import re
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from starlette.testclient import TestClient

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.status import CanaryStats, EngineStats, TierStats
from headlong.server.telemetry.observer import EndedCompletion, EndedRequest

STATS = EngineStats(
    steps_total=11,
    num_running=2,
    num_waiting=3,
    owned_blocks=(40, 30),
    cached_blocks=(10, 0),
    kv_bytes_owned=70 * 512,
    kv_bytes_full=100 * 512,
    prompt_tokens_total=1000,
    generation_tokens_total=200,
    preemptions_total=4,
    prefix_queries_total=900,
    prefix_hits_total=600,
    prefix_misses_total={"never_seen": 230, "salt": 20, "evicted": 50},
    step_prefill_tokens=30,
    step_decode_tokens=2,
    step_s_total=1.5,
    model_s_total=1.25,
    canary=CanaryStats(
        requests=5, tokens=50, kl_sum=0.5, top1_agreed=49, skipped={"busy": 2, "no_room": 1}
    ),
    tiers=TierStats(
        host_bytes=4096,
        disk_bytes=8192,
        loaded_tokens=60,
        recomputed_tokens=7,
        resumes={"swapped_in": 3, "recomputed": 1},
        moved_bytes={"to_host": 12288, "from_host": 5120},
        moved_seconds={"to_host": 0.5, "from_host": 0.25},
        lost_blocks={"disk_busy": 6},
    ),
)
SECRETS = (
    "the-tenant", "the-key", "the-id", "the-prompt", "the-user", "the-query", "the-model",
    "the-path", "Hello",
)  # fmt: skip
TYPES = {
    "engine_state": "gauge",
    "engine_process_virtual_memory_bytes": "gauge",
    "engine_process_resident_memory_bytes": "gauge",
    "engine_process_start_time_seconds": "gauge",
    "engine_process_cpu_seconds": "counter",
    "engine_process_open_fds": "gauge",
    "engine_process_max_fds": "gauge",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_preemptions": "counter",
    "engine_steps": "counter",
    "engine_step_seconds": "counter",
    "engine_model_seconds": "counter",
    "kv_cache_usage_perc": "gauge",
    "kv_cache_group_usage_perc": "gauge",
    "kv_cache_blocks": "gauge",
    "kv_bytes_capacity": "gauge",
    "kv_bytes_owned": "gauge",
    "kv_bytes_saved": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prefix_cache_misses": "counter",
    "prefix_cache_loaded_tokens": "counter",
    "prefix_cache_recomputed_tokens": "counter",
    "preemption_resumes": "counter",
    "host_cache_bytes": "gauge",
    "disk_cache_bytes": "gauge",
    "kv_moved_bytes": "counter",
    "kv_moved_seconds": "counter",
    "kv_lost_blocks": "counter",
    "canary_requests": "counter",
    "canary_kl_nats": "summary",
    "canary_top1_agreement": "summary",
    "canary_skipped": "counter",
    "build": "info",
    "cache_config": "info",
    "head_group": "info",
    "rank": "info",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_params_n": "histogram",
    "request_prefill_kv_computed_tokens": "histogram",
    "request_params_max_tokens": "histogram",
    "request_max_num_generation_tokens": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_tokens_total": "histogram",
    "request_success": "counter",
    "request_rejections": "counter",
}


@pytest.fixture
def scrape(client):
    """Samples by name and labels, without the model's."""

    def read():
        response = client.get("/metrics")
        assert response.status_code == 200
        found = {}
        for family in parse_plain(response.text):
            for sample in family.samples:
                labels = dict(sample.labels)
                if family.name.startswith("headlong:"):
                    assert labels.pop("model_name") == "fake/model"
                name = sample.name.removeprefix("headlong:")
                found[name, *labels.values()] = sample.value
        return found

    return read


def test_families_have_their_types(client):
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    types = {
        family.name.removeprefix("headlong:"): family.type
        for family in parse_open(response.text)
        if family.name.startswith("headlong:")
    }
    assert types == TYPES


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain; version=0.0.4", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
            "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.3",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        ("application/openmetrics-text;version=x.y", "application/openmetrics-text; version=1.0.0"),
        ("text/plain;version=9999999999999.1;escaping=\x7f", "text/plain; version=0.0.4"),
        ("text/plain;version=x;,;,=;q=\xff", "text/plain; version=0.0.4"),
        ("," * 5000, "text/plain"),
    ],
)
def test_the_form_is_negotiated(client, accept, content_type):
    response = client.get("/metrics", headers=[(b"accept", accept.encode("latin-1"))])
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(content_type)
    assert 'headlong:num_requests_running{model_name="fake/model"} 0.0\n' in response.text


def test_what_the_engine_counts_is_read_at_every_scrape(scrape, engine):
    before = scrape()
    assert before["num_requests_running",] == before["prompt_tokens_total",] == 0
    assert before["kv_cache_blocks", "retrieval", "free"] == 100
    engine.stats = STATS
    after = scrape()
    assert after["num_requests_running",] == 2
    assert after["num_requests_waiting",] == 3
    assert after["num_preemptions_total",] == 4
    assert after["engine_steps_total",] == 11
    assert after["engine_step_seconds_total",] == 1.5
    assert after["engine_model_seconds_total",] == 1.25
    assert after["prompt_tokens_total",] == 1000
    assert after["generation_tokens_total",] == 200
    assert after["prefix_cache_queries_total",] == 900
    assert after["prefix_cache_hits_total",] == 600
    assert after["prefix_cache_misses_total", "never_seen"] == 230
    assert after["prefix_cache_misses_total", "salt"] == 20
    assert after["prefix_cache_misses_total", "evicted"] == 50
    assert after["kv_bytes_owned",] == 70 * 512
    assert after["kv_bytes_saved",] == 30 * 512


def test_what_is_kept_beyond_the_arena(scrape, engine):
    before = scrape()
    assert before["kv_moved_bytes_total", "to_disk"] == 0, "a series begins at zero"
    assert before["kv_lost_blocks_total", "unreadable"] == 0
    engine.stats = STATS
    after = scrape()
    assert after["host_cache_bytes",] == 4096
    assert after["disk_cache_bytes",] == 8192
    assert after["prefix_cache_loaded_tokens_total",] == 60
    assert after["prefix_cache_recomputed_tokens_total",] == 7
    assert after["preemption_resumes_total", "swapped_in"] == 3
    assert after["preemption_resumes_total", "recomputed"] == 1
    assert after["kv_moved_bytes_total", "from_host"] == 5120
    assert after["kv_moved_seconds_total", "to_host"] == 0.5
    assert after["kv_lost_blocks_total", "disk_busy"] == 6


def test_usage_is_that_of_the_fullest_group(scrape, engine):
    engine.stats = STATS
    found = scrape()
    assert found["kv_cache_group_usage_perc", "retrieval"] == 0.4
    assert found["kv_cache_group_usage_perc", "streaming"] == 0.6
    assert found["kv_cache_usage_perc",] == 0.6
    blocks = {key[1:]: value for key, value in found.items() if key[0] == "kv_cache_blocks"}
    assert blocks == {
        ("retrieval", "owned"): 40,
        ("retrieval", "cached"): 10,
        ("retrieval", "free"): 50,
        ("streaming", "owned"): 30,
        ("streaming", "cached"): 0,
        ("streaming", "free"): 20,
    }


def test_a_small_cache_saves_nothing_and_never_less(scrape, engine):
    engine.stats = replace(STATS, kv_bytes_full=1)
    assert scrape()["kv_bytes_saved",] == 0


def test_the_canary(scrape, engine):
    engine.stats = STATS
    found = scrape()
    assert found["canary_requests_total",] == 5
    assert (found["canary_kl_nats_sum",], found["canary_kl_nats_count",]) == (0.5, 50)
    agreed = found["canary_top1_agreement_sum",], found["canary_top1_agreement_count",]
    assert agreed == (49, 50)
    assert found["canary_skipped_total", "busy"] == 2
    assert found["canary_skipped_total", "no_room"] == 1
    assert found["canary_skipped_total", "full_already"] == 0


def test_what_requests_go_through(scrape, engine):
    observer = engine.observer
    observer.on_step(STATS)
    # The canary's work is reported, too, and is no step.
    observer.on_step(replace(STATS, canary=CanaryStats()))
    observer.on_started(0.3)
    observer.on_first_token(2.0, 1.7)
    observer.on_token(0.02)
    observer.on_token(0.04)
    observer.on_finished("stop", 30, 3, 2.06, 0.03)
    observer.on_finished("cancelled", 30, 1, 2.0, None)
    found = scrape()
    sums = {
        "iteration_tokens_total": 32,
        "request_queue_time_seconds": 0.3,
        "time_to_first_token_seconds": 2.0,
        "request_prefill_time_seconds": 1.7,
        "inter_token_latency_seconds": 0.06,
        "request_time_per_output_token_seconds": 0.03,
        "e2e_request_latency_seconds": 4.06,
        "request_prompt_tokens": 60,
        "request_generation_tokens": 4,
    }
    for name, total in sums.items():
        assert found[f"{name}_sum",] == pytest.approx(total)
    assert found["iteration_tokens_total_count",] == 1
    assert found["inter_token_latency_seconds_count",] == 2
    assert found["request_time_per_output_token_seconds_count",] == 1
    assert found["inter_token_latency_seconds_bucket", "0.025"] == 1
    # The last bucket holds a whole context.
    assert found["request_prompt_tokens_bucket", "64.0"] == 2
    finished = {key[1]: value for key, value in found.items() if key[0] == "request_success_total"}
    assert finished == {
        "stop": 1,
        "length": 0,
        "abort": 0,
        "deadline_exceeded": 0,
        "cancelled": 1,
        "draining": 0,
        "engine_dead": 0,
    }


def test_what_is_known_when_a_request_has_ended(scrape, engine):
    def completion(num_tokens, first, last):
        return EndedCompletion(
            reason="stop", num_tokens=num_tokens, first_token=first, last_token=last, ended=20.0
        )

    def end(started, *completions):
        params = SamplingParams(max_tokens=30)
        request = EngineRequest("r", [1] * 5, params, n=len(completions), arrived=1.0)
        engine.observer.on_ended(
            EndedRequest(
                request=request,
                started=started,
                prefill_chunks=(),
                num_cached_tokens=2,
                cache_misses={},
                completions=completions,
            )
        )

    end(2.0, completion(3, 4.0, 7.0), completion(9, 5.0, 10.0))
    end(None, completion(0, None, None))
    found = scrape()
    assert found["request_params_n_sum",] == 3
    assert found["request_prefill_kv_computed_tokens_sum",] == 3
    assert found["request_prefill_kv_computed_tokens_count",] == 1
    assert found["request_params_max_tokens_sum",] == 60
    assert found["request_max_num_generation_tokens_sum",] == 9
    assert found["request_max_num_generation_tokens_count",] == 2
    assert found["request_decode_time_seconds_sum",] == 6.0
    assert found["request_inference_time_seconds_sum",] == 8.0
    assert found["request_decode_time_seconds_count",] == 1


def test_the_engines_state(scrape, engine):
    def states():
        return {key[1]: each for key, each in scrape().items() if key[0] == "engine_state"}

    nothing = dict.fromkeys(("starting", "ready", "draining", "dead"), 0)
    assert states() == {**nothing, "ready": 1}
    engine.is_draining = True
    assert states() == {**nothing, "draining": 1}
    engine.is_draining, engine.is_alive = False, False
    assert states() == {**nothing, "dead": 1}
    engine.is_alive = True


def test_an_engine_elsewhere_has_no_process_here(engine, scrape):
    assert scrape()["engine_process_resident_memory_bytes",] > 0
    engine.info = replace(engine.info, pid=None)
    with TestClient(create_app(engine, ServerConfig(served_model_name=("m",)))) as client:
        assert "engine_process" not in client.get("/metrics").text


def test_a_process_that_is_gone_does_not_break_a_scrape(engine):
    engine.info = replace(engine.info, pid=2**22 + 1)
    with TestClient(create_app(engine, ServerConfig(served_model_name=("m",)))) as client:
        text = client.get("/metrics").text
    assert "engine_process" not in text
    assert "num_requests_running" in text


def test_head_groups(client):
    lines = [
        each for each in client.get("/metrics").text.splitlines() if "head_group_info{" in each
    ]
    assert [
        re.findall(r'(group|num_heads|sink_size|window_size)="(\w+)"', each) for each in lines
    ] == [
        [("group", "retrieval"), ("num_heads", "1"), ("sink_size", "0"), ("window_size", "all")],
        [("group", "streaming"), ("num_heads", "1"), ("sink_size", "4"), ("window_size", "16")],
    ]
    assert 'kv_bytes_capacity{model_name="fake/model"} 76800.0' in client.get("/metrics").text


def test_neither_texts_nor_keys_nor_tenants_are_counted(engine, tmp_path):
    file = tmp_path / "keys"
    file.write_text("the-tenant:the-key\n")
    config = ServerConfig(served_model_name=("m",), api_key_file=file)
    with TestClient(create_app(engine, config)) as client:
        for key in ("the-key", "a-guess"):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "the-id"}
            for path, fields in (
                ("/v1/completions", {"prompt": "the-prompt", "user": "the-user"}),
                ("/v1/completions?the-query", {"prompt": "the-prompt", "model": "the-model"}),
                ("/v1/the-path", {}),
            ):
                client.post(path, json={"model": "m", **fields}, headers=headers)
        text = client.get("/metrics", headers={"X-API-Key": "the-key"}).text
    assert 'reason="model_not_found"} 1.0' in text
    found = [secret for secret in (*SECRETS, "a-guess") if secret in text]
    assert found == []


def _rejections(found):
    counts = {key[1]: each for key, each in found.items() if key[0] == "request_rejections_total"}
    assert len(counts) == 11, "those that did not occur are there, too"
    return {reason: count for reason, count in counts.items() if count}


def test_rejections_are_counted_by_reason(scrape, client, post, engine):
    from headlong.server.errors import QueueFullError

    assert _rejections(scrape()) == {}
    post("/v1/completions", model="other")
    post("/v1/completions", temperature=-1)
    post("/v1/completions", prompt="x" * 100)
    post("/v1/chat/completions", max_tokens=1000)
    post("/v1/completions", prompt="x" * 300_000)
    client.post("/v1/completions", content=b"{}")
    client.post("/nowhere")
    engine.refusal = QueueFullError("full", 1)
    post("/v1/completions", stream=True)
    engine.refusal = None
    post("/v1/completions")
    # Whoever looks for a page, or asks whether it is alive, is no request.
    client.get("/nowhere")
    engine.is_alive = False
    client.get("/health")
    post("/v1/completions")
    engine.is_alive = True
    assert _rejections(scrape()) == {
        "model_not_found": 1,
        "invalid_request_error": 2,
        "context_length_exceeded": 2,
        "request_too_large": 1,
        "unsupported_media_type": 1,
        "queue_full": 1,
        "engine_dead": 1,
    }


def test_failures_are_not_rejections(scrape, post, engine):
    engine.failure = "it could not go on"
    assert post("/v1/completions").status_code == 500
    engine.failure = RuntimeError("broken")
    assert post("/v1/completions").status_code == 500
    assert _rejections(scrape()) == {}


def test_strangers_are_counted(engine):
    config = ServerConfig(served_model_name=("m",), api_key=("hush",))
    with TestClient(create_app(engine, config)) as client:
        client.post("/v1/completions")
        client.get("/v1/models", headers={"Authorization": "Bearer guess"})
        client.request("BREW", "/metrics")
        client.get("/health")
        text = client.get("/metrics", headers={"Authorization": "Bearer hush"}).text
    told = 'headlong:request_rejections_total{model_name="m",reason="invalid_api_key"} 3.0'
    assert told in text


def test_infos(scrape, client):
    text = client.get("/metrics").text
    (build,) = [line for line in text.splitlines() if line.startswith("headlong:build_info{")]
    for label in ('device="cpu"', 'dtype="float32"', 'model="fake/model"', 'version="'):
        assert label in build
    (config,) = [line for line in text.splitlines() if "cache_config_info{" in line]
    for label in ('block_size="16"', 'max_model_len="64"', 'num_blocks="150"'):
        assert label in config
    assert scrape()["process_resident_memory_bytes",] > 0


def test_applications_share_nothing(engine, tokenizer, scrape):
    fresh = type(engine)(tokenizer)
    with TestClient(create_app(fresh, ServerConfig(served_model_name=('a"b\n',)))) as other:
        engine.observer.on_token(1.0)
        text = other.get("/metrics").text
    families = {family.name: family for family in parse_plain(text)}
    samples = families["headlong:inter_token_latency_seconds"].samples
    assert {sample.labels["model_name"] for sample in samples} == {'a"b\n'}
    assert all(sample.value == 0 for sample in samples if sample.name.endswith("_count"))


def test_the_openapi_document_says_what_it_is(client):
    responses = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]
    assert set(responses["200"]["content"]) == {"text/plain", "application/openmetrics-text"}
    assert "401" in responses
