"""What the Triton path's results do not depend on, bit for bit, and the plan that graphs keep."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import HeadPolicy
from headlong.server.engine.batch import build_attention_batch
from support.paged import PagedCase, build_case, build_layout
from support.triton import (
    DEVICE,
    geometry,
    make_attention,
    pick,
    poisoned_memory,
    run,
    sequence_rows,
    short_splits,
    triton_suite,
)

pytestmark = triton_suite

DECODES = ((0, 1), (63, 1), (300, 1), (127, 1), (16, 1), (64, 1))
LENGTHS = (*DECODES[:4], (0, 33), (40, 9), (70, 20))
DTYPES = [torch.float32, torch.bfloat16]
QUANTISED = {"retrieval": "int4", "streaming": "int8"}
KINDS = [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, QUANTISED)]
ONE_LAYER = {"retrieval": ((True, False),)}


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "formats"), KINDS)
def test_a_sequence_alone_is_as_in_a_batch(
    dtype: torch.dtype, formats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_splits(monkeypatch)
    case = build_case(geometry(dtype=dtype, formats=formats), LENGTHS, seed=1)
    together = run(case, make_attention(case))
    for sequence, rows in enumerate(sequence_rows(case)):
        alone = run(pick(case, [sequence]), make_attention(case))
        assert same(alone, [output[rows] for output in together])
    backwards = pick(case, range(len(LENGTHS))[::-1])
    turned = run(backwards, make_attention(case))
    for rows, there in zip(sequence_rows(case), reversed(sequence_rows(backwards)), strict=True):
        assert same([output[there] for output in turned], [output[rows] for output in together])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_run_is_as_the_first(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    short_splits(monkeypatch)
    case = build_case(geometry(dtype=dtype), LENGTHS, seed=2)
    attention = make_attention(case)
    first = run(case, attention)
    assert same(run(case, attention), first)


def test_how_many_programs_share_the_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    short_splits(monkeypatch)
    case = build_case(geometry(), DECODES, seed=3)
    attention = make_attention(case)
    expected = run(case, attention)
    for num_programs in (1, 2, 100):
        assert attention._num_programs != num_programs
        attention._num_programs = num_programs
        assert same(run(case, attention), expected)


@pytest.mark.parametrize(("dtype", "formats"), KINDS)
@pytest.mark.parametrize("policy", [HeadPolicy(4, 24), HeadPolicy(0, 17), HeadPolicy(40, 70)])
def test_where_a_chunk_began(
    policy: HeadPolicy,
    dtype: torch.dtype,
    formats: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last rows of a chunk, as a chunk of their own. Tiles cut a query group in two."""
    # The interpreter multiplies by NumPy, where a row's product depends on its place in the matrix.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    settings = geometry(dtype=dtype, formats=formats, streaming=policy, group_size=3, **ONE_LAYER)
    case = build_case(settings, ((60, 40),), seed=4)
    attention = make_attention(case)
    (whole,) = run(case, attention)
    for count in (2, 17, 31):
        last = replace(
            case,
            batch=build_attention_batch(case.sequences, [count]),
            **{
                name: [tensor[-count:] for tensor in getattr(case, name)]
                for name in ("query", "key", "value")
            },
        )
        assert same(run(last, attention), [whole[-count:]])


def padded(case: PagedCase, num_seqs: int) -> PagedCase:
    """The same tokens, with rows of NaN behind."""

    def pad(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.cat(
                [tensor, tensor.new_full((num_seqs - len(tensor), *tensor.shape[1:]), torch.nan)]
            )
            for tensor in tensors
        ]

    return replace(case, query=pad(case.query), key=pad(case.key), value=pad(case.value))


@pytest.mark.parametrize("formats", [{}, QUANTISED])
def test_a_padded_step_is_as_the_step(
    formats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of several sizes one after the other in one buffer, as graphs replay them."""
    from headlong.kernels.triton_attention import DecodeBuffer

    short_splits(monkeypatch)
    case = build_case(geometry(formats=formats), DECODES, seed=5)
    sinks = torch.linspace(-2, 2, case.geometry.num_q_heads)
    attention = make_attention(case)
    with poisoned_memory():
        buffer = DecodeBuffer(attention, 8)
    addresses = {size: buffer.plan(size).tables.data_ptr() for size in (1, 2, 4, 8)}
    for chosen, size in (((0, 1, 2, 3, 4, 5), 8), ((4, 0), 4), ((2,), 1), ((5, 2), 2), ((1,), 8)):
        step = pick(case, chosen)
        fresh = make_attention(case)
        expected = run(step, fresh, sinks=sinks)
        attention.arena.copy_(case.arena)
        assert buffer.take(step.batch, size)
        plan = buffer.plan(size)
        assert plan.tables.data_ptr() == addresses[size]
        actual = run(padded(step, size), attention, plan, sinks=sinks)
        assert same([output[: len(chosen)] for output in actual], expected)
        for output in actual:
            assert torch.equal(output[len(chosen) :], torch.zeros_like(output[len(chosen) :]))
        assert torch.equal(attention.arena, fresh.arena)


def test_a_step_of_nothing_but_padding_writes_nothing() -> None:
    from headlong.kernels.triton_attention import DecodeBuffer

    case = build_case(geometry(), DECODES, seed=6)
    attention = make_attention(case)
    buffer = DecodeBuffer(attention, 4)
    assert buffer.take(pick(case, [0, 1, 2, 3]).batch, 4)
    buffer.clear(4)
    run(pick(case, [0, 1, 2, 3]), attention, buffer.plan(4))
    assert torch.equal(attention.arena.cpu(), case.arena)


def test_a_step_that_does_not_fit_is_left_out() -> None:
    """Sequences that share their blocks have more of them than the arena."""
    from headlong.kernels.triton_attention import DecodeBuffer

    case = build_case(geometry(), ((300, 1),), seed=7)
    buffer = DecodeBuffer(make_attention(case), 8)
    assert buffer.take(pick(case, [0]).batch, 1)
    plan = buffer.plan(1)
    before = [each.clone() for each in (plan.rows, plan.tables, plan.splits, plan.lists)]
    assert not buffer.take(pick(case, [0] * 8).batch, 8)
    assert same([plan.rows, plan.tables, plan.splits, plan.lists], before)


def test_a_padded_step_only_decodes() -> None:
    from headlong.kernels.triton_attention import DecodeBuffer

    case = build_case(geometry(), ((30, 1), (0, 1), (3, 2)), seed=8)
    buffer = DecodeBuffer(make_attention(case), 8)
    with pytest.raises(ValueError, match="num_seqs 8 pads decodes only, got 2 of 3 sequences"):
        buffer.take(case.batch, 8)
    with pytest.raises(ValueError, match="num_seqs 1 pads decodes only, got 2 of 2 sequences"):
        buffer.take(pick(case, [0, 1]).batch, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_the_arena_holds_fits(data: st.DataObject) -> None:
    """A buffer has room for any decodes whose blocks are their own."""
    from headlong.kernels.triton_attention import DecodeBuffer, TritonAttention

    policy = HeadPolicy(data.draw(st.integers(0, 700)), data.draw(st.integers(1, 1500)))
    chosen = geometry(
        streaming=policy, block_size=data.draw(st.sampled_from([8, 64])), head_dim=16, group_size=1
    )
    layout = build_layout(chosen, data.draw(st.integers(1, 60)))
    cache = KVCache(chosen.groups, layout)
    sequences = []
    for length in data.draw(st.lists(st.integers(0, 4000), min_size=1, max_size=20)):
        sequence = cache.begin()
        taken = cache.max_extension(sequence, length)
        cache.extend(sequence, taken)
        cache.release_expired(sequence)
        if cache.max_extension(sequence, 1):
            cache.extend(sequence, 1)
            sequences.append(sequence)
        else:
            cache.free(sequence)
    if not sequences:
        return
    arena = torch.empty(layout.total_bytes, dtype=torch.uint8, device=DEVICE)
    attention = TritonAttention(arena, layout, chosen.num_q_heads)
    size = len(sequences) + data.draw(st.integers(0, 3))
    buffer = DecodeBuffer(attention, size)
    assert buffer.take(build_attention_batch(sequences, [1] * len(sequences)), size)
