from hypothesis import given
from hypothesis import strategies as st

from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.status import EngineInfo, GroupInfo
from headlong.server.fleet.prompt_pages import (
    NAME_BYTES,
    max_pages,
    page_names,
    page_tokens,
    request_pages,
    split_names,
)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens, tokens, tokens, st.integers(1, 8))
def test_prompts_share_the_names_of_what_they_share(
    begin: list[int], one: list[int], other: list[int], size: int
) -> None:
    first, second = (split_names(page_names(begin + each, size, "")) for each in (one, other))
    shared = sum(a == b for a, b in zip(first, second, strict=False))
    common = 0
    for a, b in zip(begin + one, begin + other, strict=False):
        if a != b:
            break
        common += 1
    assert shared == common // size
    assert first[:shared] == second[:shared]
    assert len(first) == (len(begin) + len(one)) // size


def _request(**fields: object) -> EngineRequest:
    return EngineRequest("r", list(range(200)), SamplingParams(), **fields)  # type: ignore[arg-type]


def test_salt_and_policy_are_part_of_a_name() -> None:
    requests = [
        _request(),
        _request(cache_salt="a"),
        _request(cache_salt="\ud800"),
        _request(kv_policy=KVPolicy(full=True)),
        _request(kv_policy=KVPolicy(sink_size=4)),
    ]
    named = [request_pages(each, 64) for each in requests]
    assert all(len(each) == 3 * NAME_BYTES for each in named)
    assert len({each[:NAME_BYTES] for each in named}) == len(requests)
    assert request_pages(_request(tenant="b", priority=3), 64) == named[0]


def _info(block_size: int, *groups: tuple[int | None, int]) -> EngineInfo:
    return EngineInfo(
        model="m", max_model_len=1000, vocab_size=10, max_num_seqs=2, block_size=block_size,
        eos_token_ids=(), default_sampling={}, head_groups=(), full_token_bytes=1, device="cpu",
        dtype="float32", lines=(),
        groups=tuple(
            GroupInfo(name="g", sink_size=0, window_size=window, num_heads=1, num_blocks=blocks,
                      block_bytes=1)
            for window, blocks in groups
        ),
    )  # fmt: skip


def test_pages_are_no_smaller_than_blocks() -> None:
    assert page_tokens(_info(16, (None, 8))) == 64
    assert page_tokens(_info(256, (None, 8))) == 256


def test_the_group_that_keeps_all_says_what_a_cache_holds() -> None:
    assert max_pages(_info(16, (None, 100), (128, 7))) == 25
    assert max_pages(_info(256, (None, 100), (128, 7))) == 100
    assert max_pages(_info(16, (128, 40))) == 10
