"""Bounds and sums that pages keep, by the Triton kernels."""

import importlib
from collections.abc import Callable

import pytest
import torch

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels.layout import ArenaLayout, view_pages
from support.summarised import Append, Growing, Setting, by_reference, check_summaries
from support.triton import DEVICE, ON_CUDA, triton_append, triton_suite

pytestmark = triton_suite

POLICIES = (None, HeadPolicy(5, 40), RETRIEVAL, HeadPolicy(20, 12))
STEPS = ([3, 0, 50, 1], [1, 1, 1, 1], [40, 0, 0, 31], [1, 1, 1, 1], [1, 37, 1, 1])


by_triton = triton_append()


def grow(
    setting: Setting,
    append: Callable[[torch.Tensor, ArenaLayout], Append],
    steps: tuple[list[int], ...] = STEPS,
) -> Growing:
    growing = Growing(setting, append, POLICIES)
    for num_new in steps:
        growing.step(num_new)
    return growing


@pytest.mark.parametrize(
    "setting",
    [
        Setting(block_size=16),
        Setting(block_size=16, dtype=torch.bfloat16),
        Setting(block_size=8, dtype=torch.float16, head_dim=80),
        Setting(block_size=64, head_dim=64),
        *(
            Setting(block_size=16, retrieval_format=form, streaming_format=form)
            for form in ("int8", "fp8", "int4")
        ),
        Setting(
            block_size=16, dtype=torch.bfloat16, retrieval_format="int4", streaming_format="int8"
        ),
        Setting(block_size=16, head_dim=80, dtype=torch.float16, streaming_format="fp8"),
    ],
    ids=str,
)
def test_summaries_are_those_of_the_reference(setting: Setting) -> None:
    check_summaries(
        grow(setting, by_triton),
        grow(setting, by_reference),
        # The interpreter cuts bfloat16 off where it has to be rounded.
        rounds=setting.dtype != torch.bfloat16 or ON_CUDA,
    )


def test_summaries_do_not_depend_on_chunks() -> None:
    setting = Setting(block_size=8)
    whole = grow(setting, by_triton, ([290, 0, 40, 0],))
    parts = grow(
        setting,
        by_triton,
        ([5, 0, 0, 0], [1, 0, 1, 0], [100, 0, 0, 0], [1, 0, 38, 0], [183, 0, 1, 0]),
    )
    assert whole.summaries.keys() == parts.summaries.keys()
    for place, found in parts.summaries.items():
        assert torch.equal(found, whole.summaries[place]), place


def test_padding_writes_nothing() -> None:
    """A decode of a CUDA graph's size: what pads it has neither slots nor a context."""
    module = importlib.import_module("headlong.kernels.triton_attention")
    growing = Growing(Setting(), by_reference, (None, None))
    growing.step([15, 16])
    growing.cache.extend(growing.sequences[0], 1)
    growing.cache.extend(growing.sequences[1], 1)
    batch = growing.batch([0, 1], [1, 1])
    attention = module.TritonAttention(growing.arena.to(DEVICE, copy=True), growing.layout, 3)
    buffer = module.DecodeBuffer(attention, 4)
    plan = buffer.plan(4)
    key, value = growing.new_tokens(0, [0, 1], [1, 1])
    by_reference(growing.arena, growing.layout)(0, key, value, batch)
    padded = [
        torch.cat([each, torch.full_like(each, torch.nan)]).to(DEVICE).transpose(0, 1)
        for each in (key, value)
    ]
    assert buffer.take(batch, 4)
    attention.append(0, *padded, plan)
    for _ in range(2):
        found = attention.arena.cpu()
        for group in range(2):
            mine = view_pages(growing.layout, found, group)
            expected = view_pages(growing.layout, growing.arena, group)
            for section in ("keys", "values", "bounds", "sums"):
                one, other = getattr(mine, section), getattr(expected, section)
                if other is not None:
                    torch.testing.assert_close(one, other, equal_nan=True)
        buffer.clear(4)
        attention.append(0, *padded, plan)
