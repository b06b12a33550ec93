import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.loadtest.goodput import Goodput, parse_goodput
from headlong.loadtest.records import RequestRecord

# First piece after 400 ms, five tokens 50 ms apart on average with one gap of 80 ms, 600 ms in all.
RECORD = RequestRecord(
    session=0,
    turn=0,
    scheduled_s=1.0,
    sent_s=2.0,
    token_times_s=(2.4, 2.44, 2.48, 2.56, 2.6),
    finished_s=2.6,
    num_prompt_tokens=10,
    num_completion_tokens=5,
    num_cached_tokens=None,
    text="one two three",
)


def test_limits_are_read_in_any_grouping() -> None:
    expected = Goodput(ttft=500, tpot=50.5, e2el=2000)
    assert parse_goodput(["ttft:500", "tpot:50.5", "e2el:2000"]) == expected
    assert parse_goodput(["ttft:500 tpot:50.5 e2e:2000"]) == expected
    assert parse_goodput(["e2e:2000,tpot:50.5", "ttft:5e2"]) == expected


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ([], "goodput needs at least one limit"),
        ([" "], "goodput needs at least one limit"),
        (["ttfb:500"], "goodput limit 'ttfb:500' is unknown: .*ttft, tpot, itl, e2el"),
        (["500"], "goodput limit '500' is unknown"),
        (["ttft"], "goodput ttft must be a number of milliseconds, got ''"),
        (["ttft:fast"], "goodput ttft must be a number of milliseconds, got 'fast'"),
        (["ttft:1:2"], "goodput ttft must be a number of milliseconds, got '1:2'"),
        (["ttft:0"], "goodput ttft must be milliseconds above 0 and finite, got 0.0"),
        (["tpot:-1"], "goodput tpot must be milliseconds above 0 and finite, got -1.0"),
        (["tpot:nan"], "goodput tpot must be milliseconds above 0 and finite, got nan"),
        (["itl:inf"], "goodput itl must be milliseconds above 0 and finite, got inf"),
        (["ttft:1", "ttft:2"], "goodput limit ttft is given twice"),
        (["e2e:1", "e2el:2"], "goodput limit e2el is given twice"),
    ],
)
def test_a_bad_limit_is_one_clear_line(limits: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        parse_goodput(limits)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("limit", "met"),
    [
        ("ttft:401", True),
        ("ttft:399", False),
        ("tpot:51", True),
        ("tpot:49", False),
        ("itl:81", True),
        ("itl:79", False),
        ("e2el:601", True),
        ("e2el:599", False),
        ("ttft:401 tpot:51 itl:81 e2el:601", True),
        ("ttft:401 tpot:51 itl:81 e2el:599", False),
        ("ttft:399 tpot:51 itl:81 e2el:601", False),
    ],
)
def test_every_limit_must_be_kept(limit: str, met: bool) -> None:
    assert parse_goodput([limit]).met(RECORD) is met


@given(st.sampled_from(["ttft", "tpot", "itl", "e2el"]))
def test_a_failed_request_is_never_good(name: str) -> None:
    goodput = parse_goodput([f"{name}:1e9"])
    assert goodput.met(RECORD)
    assert not goodput.met(replace(RECORD, error="stream"))


def test_what_cannot_be_measured_is_not_kept() -> None:
    silent = replace(RECORD, token_times_s=())
    assert not Goodput(ttft=1e9).met(silent)
    assert not Goodput(itl=1e9).met(silent)
    assert not Goodput(tpot=1e9).met(replace(RECORD, num_completion_tokens=None))
    assert Goodput(e2el=1e9).met(silent)


def test_an_answer_of_one_token_has_none_that_could_be_late() -> None:
    short = replace(RECORD, token_times_s=(2.4,), num_completion_tokens=1)
    assert Goodput(tpot=1e-9, itl=1e-9).met(short)
    assert math.isclose(short.ttft_s or 0, 0.4)
