from pathlib import Path
from typing import Any

import pytest

from headlong.loadtest.bench import BenchSettings
from headlong.loadtest.tokens import WordTokenizer

TOKENIZER = WordTokenizer()
TRACE = '{"timestamp": 1, "prompt": "a b"}\n{"timestamp": 3, "prompt": "c d"}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": "chat", "shape": {"random_input_len": 5}},
         "--random-input-len belongs to --workload random, not to chat"),
        ({"shape": {"output_len": 5}},
         "--output-len belongs to --workload shared-prefix or chat or trace, not to random"),
        ({"num_prompts": 0}, "--num-prompts must be 1 or more, got 0"),
        ({"num_warmups": -1}, "--num-warmups must be 0 or more, got -1"),
        ({"max_concurrency": 0}, "--max-concurrency must be 1 or more, got 0"),
        ({"workload": "trace"}, "--workload trace needs --trace FILE"),
        ({"workload": "trace", "shape": {"trace": Path("x")}, "endpoint": "chat"},
         "--endpoint contradicts --workload trace"),
        ({"workload": "trace", "shape": {"trace": Path("x")}, "request_rates": (1.0,)},
         "--request-rate contradicts --workload trace"),
        ({"workload": "chat", "endpoint": "completions"}, "--endpoint completions contradicts"),
        ({"arrivals": "constant"}, "--arrivals needs --request-rate"),
        ({"ramp_up_duration": 3.0}, "--ramp-up-duration needs --request-rate"),
        ({"request_rates": (2.0, 2.0)}, "--request-rate: the same rate is given twice"),
        ({"request_rates": (0.0,)}, "--request-rate must be above 0"),
        ({"request_rates": (1.0,), "arrivals": "gamma"}, "gamma arrivals need --burstiness"),
        ({"request_rates": (1.0,), "arrivals": "constant", "burstiness": 2.0},
         "--burstiness=2.0 means nothing for constant arrivals"),
        ({"request_rates": (1.0,), "arrivals": "ramp"}, "ramp arrivals need --ramp-up-duration"),
    ],
)  # fmt: skip
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchSettings(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"random_input_len": 0}, "--random-input-len must be at least 1, got 0"),
        ({"random_range_ratio": 1.5}, "--random-range-ratio must be at least 0 and below 1"),
    ],
)
def test_the_makers_errors_name_the_options(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchSettings(shape=shape).make_workload(TOKENIZER, 0)


@pytest.mark.parametrize(
    ("workload", "shape", "chat", "turns"),
    [
        ("random", {"random_input_len": 9}, False, 1),
        ("shared-prefix", {"num_prefixes": 2, "prefix_len": 9, "suffix_len": 4}, False, 1),
        ("chat", {"document_len": 300, "num_turns": 2}, True, 2),
        ("needle", {"context_len": [200]}, True, 1),
    ],
)
def test_a_warm_up_is_of_the_same_kind_and_not_the_same(
    workload: Any, shape: dict[str, Any], chat: bool, turns: int
) -> None:
    settings = BenchSettings(workload=workload, shape=shape, num_prompts=3, num_warmups=2)
    made, warm_up = settings.make_workload(TOKENIZER, 0)
    assert (len(made.sessions), len(warm_up)) == (3, 2)
    assert made.chat == chat
    assert all(len(session.turns) == turns for session in (*made.sessions, *warm_up))
    assert not {each.turns[0].prompt for each in warm_up} & {
        each.turns[0].prompt for each in made.sessions
    }


def test_the_tests_of_a_sweep_share_no_prompt() -> None:
    settings = BenchSettings(num_prompts=3)
    first, second = (settings.make_workload(TOKENIZER, index)[0] for index in range(2))
    prompts = [{each.turns[0].prompt for each in made.sessions} for made in (first, second)]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_endpoint_can_be_chosen(endpoint: Any) -> None:
    for workload in ("random", "shared-prefix", "needle"):
        made, _ = BenchSettings(workload=workload, num_prompts=10, endpoint=endpoint).make_workload(
            TOKENIZER, 0
        )
        assert made.chat == (endpoint == "chat")


@pytest.mark.parametrize("ignore", [True, False])
def test_ignore_eos_can_be_chosen(ignore: bool) -> None:
    made, _ = BenchSettings(num_prompts=1, ignore_eos=ignore).make_workload(TOKENIZER, 0)
    assert made.ignore_eos == ignore
    assert BenchSettings(num_prompts=1).make_workload(TOKENIZER, 0)[0].ignore_eos


def test_a_trace_is_sent_at_its_times(trace: Path) -> None:
    settings = BenchSettings(
        workload="trace", shape={"trace": trace, "trace_speed": 4.0}, num_warmups=2
    )
    made, warm_up = settings.make_workload(TOKENIZER, 0)
    plan = settings.make_plan(made, None, 0)
    assert plan.starts_s == [0.0, 0.5]
    assert len(warm_up) == 2
    assert settings.config()["trace"] == str(trace)


def test_plans() -> None:
    made, _ = BenchSettings(num_prompts=3).make_workload(TOKENIZER, 0)
    closed = BenchSettings(max_concurrency=5).make_plan(made, None, 0)
    assert (closed.starts_s, closed.concurrency) == (None, 5)
    assert BenchSettings().make_plan(made, None, 0).concurrency == 8
    constant = BenchSettings(request_rates=(4.0,), arrivals="constant", max_concurrency=2)
    plan = constant.make_plan(made, 4.0, 0)
    assert (plan.starts_s, plan.concurrency) == ([0.0, 0.25, 0.5], 2)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "poisson"),
        ({"burstiness": 0.5}, "gamma"),
        ({"ramp_up_duration": 5.0}, "ramp"),
        ({"arrivals": "constant"}, "constant"),
    ],
)
def test_what_options_mean_for_the_arrivals(options: dict[str, Any], kind: str) -> None:
    made, _ = BenchSettings(num_prompts=20).make_workload(TOKENIZER, 0)
    settings = BenchSettings(request_rates=(2.0,), **options)
    named = {"arrivals": kind, **options}
    assert settings.make_plan(made, 2.0, 0) == BenchSettings(
        request_rates=(2.0,), **named
    ).make_plan(made, 2.0, 0)
    plain = BenchSettings(request_rates=(2.0,)).make_plan(made, 2.0, 0)
    assert (settings.make_plan(made, 2.0, 0) == plain) == (kind == "poisson")
