"""Bounds and sums that pages keep, on the PyTorch path."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import SPAN_BLOCKS, ArenaLayout, PageLayout
from headlong.kernels.torch_attention import TorchAttention
from headlong.kernels.torch_summaries import plan_summaries
from support.summarised import Append, Growing, Setting, by_reference, check_summaries

FORMATS = [None, "int8", "fp8", "int4"]

STEPS = ([3, 0, 50, 1], [1, 1, 1, 1], [70, 0, 0, 5], [1, 1, 1, 1], [1, 280, 1, 1], [9, 8, 7, 300])
"""Chunks that begin and end inside blocks, go over spans, and leave windows behind."""

POLICIES = (None, HeadPolicy(5, 40), RETRIEVAL, HeadPolicy(20, 12))
"""Sinks of no block, of less than one and of several; one that drops nothing."""


def by_torch(arena: torch.Tensor, layout: ArenaLayout) -> Append:
    attention = TorchAttention(arena, layout, num_q_heads=3)

    def append(layer: int, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch) -> None:
        plan = attention.plan(batch)
        attention.append(layer, key.transpose(0, 1), value.transpose(0, 1), plan)

    return append


def grow(setting: Setting, steps: Sequence[Sequence[int]], append: object = by_torch) -> Growing:
    growing = Growing(setting, append, POLICIES)  # type: ignore[arg-type]
    for num_new in steps:
        growing.step(num_new)
    return growing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_summaries_are_those_of_the_reference(form: str | None, dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype, retrieval_format=form, streaming_format=form)
    check_summaries(grow(setting, STEPS), grow(setting, STEPS, by_reference))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(HeadPolicy(0, 2)),
        Setting(HeadPolicy(4, 16), head_dim=80, dtype=torch.float16, streaming_format="int4"),
        Setting(HeadPolicy(17, 9), block_size=16, retrieval_format="fp8"),
        Setting(HeadPolicy(3, 100), block_size=12, head_dim=6),
        Setting(HeadPolicy(64, 65), block_size=64),
    ],
    ids=str,
)
def test_other_shapes(setting: Setting) -> None:
    check_summaries(grow(setting, STEPS), grow(setting, STEPS, by_reference))


@cache
def whole() -> Growing:
    """Every sequence in one chunk."""
    return grow(Setting(), [[300, 290, 270, 280]])


@given(st.data())
@settings(max_examples=15)
def test_summaries_do_not_depend_on_chunks(data: st.DataObject) -> None:
    """To the last bit, however the tokens came, alone or in a batch."""
    growing = Growing(Setting(), by_torch, POLICIES)
    left = [sequence.num_tokens for sequence in whole().sequences]
    chunks = st.integers(0, 1) | st.integers(0, 20) | st.integers(0, 300)
    while any(left):
        num_new = [min(most, data.draw(chunks)) for most in left]
        if not any(num_new):
            num_new = left
        growing.step(num_new)
        left = [most - new for most, new in zip(left, num_new, strict=True)]
    assert growing.summaries.keys() == whole().summaries.keys()
    for place, found in growing.summaries.items():
        assert torch.equal(found, whole().summaries[place]), place


def test_a_fork_goes_on_with_what_its_copy_says() -> None:
    setting = Setting()
    growing = Growing(setting, by_torch, (None, None))
    alone = Growing(setting, by_torch, (None, None))
    growing.tokens[1] = alone.tokens[1] = growing.tokens[0]
    growing.step([101, 0])
    growing.cache.free(growing.sequences[1])
    growing.sequences[1] = growing.cache.fork(growing.sequences[0])
    alone.step([101, 101])
    for num_new in ([1, 1], [1, 9], [30, 2]):
        growing.step(num_new)
        alone.step(num_new)
    for place, found in growing.summaries.items():
        assert torch.equal(found, alone.summaries[place]), place


def test_nothing_is_left_of_a_block_s_former_owner() -> None:
    """Whose keys were larger, and whose spans went further."""
    setting = Setting(num_blocks=50)
    growing = Growing(setting, by_torch, (None,), longest=1024)
    fresh = Growing(setting, by_torch, (None,), longest=1024)
    growing.tokens *= 100
    for _ in range(12):
        growing.step([32])
    growing.cache.free(growing.sequences[0])
    growing.tokens = fresh.tokens
    growing.summaries.clear()
    growing.sequences[0] = growing.cache.begin()
    for num_new in (1, 1, 130, 1, 140, 1, 1, 14):
        growing.step([num_new])
        fresh.step([num_new])
    assert growing.summaries.keys() == fresh.summaries.keys()
    for place, found in growing.summaries.items():
        assert torch.equal(found, fresh.summaries[place]), place


def test_a_plain_decode_plans_sums_only_where_a_block_begins() -> None:
    growing = Growing(Setting(), by_torch)
    page = growing.layout.pages[1]
    begun: list[bool] = []
    for _ in range(17):
        batch = growing.step([1])
        begun.append(
            plan_summaries(page, batch.groups[1], batch, torch.device("cpu")).sums is not None
        )
    assert [index for index, each in enumerate(begun) if each] == [0, 8, 16]


def test_pages_without_summaries_plan_none() -> None:
    growing = Growing(Setting(), by_torch)
    batch = growing.step([20])
    plan = plan_summaries(
        PageLayout(8, 16, torch.float32), batch.groups[0], batch, torch.device("cpu")
    )
    assert (plan.bounds, plan.sums) == (None, None)


def test_bounds_say_what_keys_there_are() -> None:
    """Not by the reference's word: by the keys that were appended."""
    setting = Setting(num_blocks=60)
    growing = Growing(setting, by_torch)
    for num_new in (3, 300, 1, 1):
        growing.step([num_new])
    layer, head = growing.cache.groups[0].members[1]
    keys = growing.tokens[0, layer, 0, :305, head]
    ends = list(accumulate([8] * 39))
    for logical, end in enumerate(ends):
        first_of_span = logical // SPAN_BLOCKS * SPAN_BLOCKS * 8
        least, greatest, span_least, span_greatest = growing.summaries[0, 0, 1, logical]
        assert torch.equal(least, keys[end - 8 : end].amin(0))
        assert torch.equal(greatest, keys[end - 8 : end].amax(0))
        assert torch.equal(span_least, keys[first_of_span:end].amin(0))
        assert torch.equal(span_greatest, keys[first_of_span:end].amax(0))
