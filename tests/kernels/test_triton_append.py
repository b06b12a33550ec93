"""Append against the reference, byte for byte, and both kernels over an arena of 2**31 elements."""

from dataclasses import replace

import pytest
import torch

from headlong.kernels import reference
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import build_arena_layout
from support.compare import TOLERANCES
from support.paged import PagedCase, build_case
from support.triton import DEVICE, geometry, make_attention, place, run, triton_suite

pytestmark = triton_suite

LENGTHS = ((0, 1), (15, 1), (30, 70), (0, 17), (63, 1))


def appended(case: PagedCase, layer: int, batch: AttentionBatch, rows: slice) -> torch.Tensor:
    """The arena after the reference appended some of the rows."""
    arena = case.arena.clone()
    key, value = case.key[layer][rows], case.value[layer][rows]
    reference.append(arena, case.layout, layer, key, value, batch)
    return arena


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("block_size", [8, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_every_byte_is_as_the_reference_says(
    dtype: torch.dtype, block_size: int, head_dim: int
) -> None:
    case = build_case(
        geometry(dtype=dtype, block_size=block_size, head_dim=head_dim), LENGTHS, seed=1
    )
    for layer in range(3):
        attention = make_attention(case)
        plan = attention.plan(case.batch)
        key, value = (place(each[layer]).transpose(0, 1) for each in (case.key, case.value))
        attention.append(layer, key, value, plan)
        expected = appended(case, layer, case.batch, slice(None))
        assert not torch.equal(expected, case.arena)
        assert torch.equal(attention.arena.cpu(), expected)


@pytest.mark.parametrize("layout", ["heads", "fused", "odd"])
def test_strides(layout: str) -> None:
    """Heads of rows, parts of one projection, and strides that no kernel takes."""
    case = build_case(geometry(), LENGTHS, seed=2)
    key, value = case.key[0], case.value[0]
    if layout == "heads":
        key, value = (each.transpose(0, 1).contiguous() for each in (key, value))
    elif layout == "fused":
        parts = torch.cat([torch.full_like(key, torch.nan), key, value], dim=1)
        _, key, value = parts.transpose(0, 1).chunk(3)
    else:
        key = torch.nn.functional.pad(key, (0, 5))[:, :, :-5].transpose(0, 1)
        value = value.transpose(1, 2).contiguous().transpose(1, 2).transpose(0, 1)
    attention = make_attention(case)
    attention.append(0, place(key), place(value), attention.plan(case.batch))
    assert torch.equal(attention.arena.cpu(), appended(case, 0, case.batch, slice(None)))


def test_a_slot_of_minus_one_is_no_token() -> None:
    case = build_case(geometry(), LENGTHS, seed=3)
    attention = make_attention(case)
    plan = attention.plan(case.batch)
    plan.slots[:, 1::2] = -1
    key, value = (place(each[0]).transpose(0, 1) for each in (case.key, case.value))
    attention.append(0, key, value, plan)
    groups = tuple(
        replace(group, slot_mapping=group.slot_mapping[::2]) for group in case.batch.groups
    )
    kept = replace(case.batch, groups=groups)
    assert torch.equal(attention.arena.cpu(), appended(case, 0, kept, slice(None, None, 2)))


def test_an_arena_of_more_elements_than_an_int32_counts() -> None:
    """The first group's blocks lie beyond element 2**31 of the arena, and so does the second group.

    Next to nothing of the memory is touched, so the CPU hardly needs any.
    """
    from headlong.kernels.triton_attention import TritonAttention

    case = build_case(
        geometry(retrieval=((True, False),), head_dim=64, dtype=torch.float16),
        ((0, 1), (100, 1), (40, 9), (0, 20)),
        seed=4,
    )
    small = case.layout
    shift = 2**31 * case.geometry.dtype.itemsize // small.block_bytes(0) + 1
    layout = build_arena_layout(
        members=tuple(group.members for group in case.geometry.groups),
        pages=small.pages,
        num_blocks=(small.num_blocks[0] + shift, small.num_blocks[1]),
    )
    assert layout.group_bases[1] > 2**31 * case.geometry.dtype.itemsize
    arena = torch.empty(layout.total_bytes, dtype=torch.uint8, device=DEVICE)
    # (the group's region in the large arena, in the small one)
    regions = [
        (layout.view_group(arena, 0)[shift:], small.view_group(case.arena, 0)),
        (layout.view_group(arena, 1), small.view_group(case.arena, 1)),
    ]
    for there, here in regions:
        there.copy_(here)
    retrieval, streaming = case.batch.groups
    retrieval = replace(
        retrieval,
        block_tables=retrieval.block_tables + shift,
        slot_mapping=retrieval.slot_mapping + shift * case.geometry.block_size,
    )
    far = replace(case, layout=layout, batch=replace(case.batch, groups=(retrieval, streaming)))
    near_attention = make_attention(case)
    far_attention = TritonAttention(arena, layout, case.geometry.num_q_heads)
    (expected,), (actual,) = run(case, near_attention), run(far, far_attention)
    assert torch.equal(actual, expected)
    for group, (there, _) in enumerate(regions):
        here = small.view_group(near_attention.arena, group)
        assert torch.equal(there, here)
