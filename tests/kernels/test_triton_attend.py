"""The Triton path against the reference, on batches that mix prefill chunks and decodes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headlong.cache.policy import HeadPolicy
from headlong.kernels import triton_plan
from headlong.kernels.batch import UNBOUNDED
from support.compare import TOLERANCES
from support.paged import build_case
from support.triton import check, geometry, make_attention, run, short_splits, triton_suite

pytestmark = triton_suite

# (cached, new) tokens: decodes and chunks, in no order.
LENGTHS = ((0, 1), (15, 1), (0, 33), (16, 1), (40, 9), (130, 1), (17, 1), (70, 20))
SHORT = ((0, 1), (40, 9), (70, 1), (0, 18))
ONE_LAYER = {"retrieval": ((True, False),)}


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [
        (torch.float32, 8),
        (torch.float16, 8),
        (torch.float32, 16),
        (torch.bfloat16, 16),
        (torch.float16, 32),
        (torch.float32, 64),
        (torch.bfloat16, 128),
    ],
)
def test_dtypes_and_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    check(build_case(geometry(dtype=dtype, block_size=block_size), LENGTHS, seed=1))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 257])
def test_odd_lengths(length: int) -> None:
    """As the context of a decode, as a first chunk, and as a later one."""
    lengths = ((length - 1, 1), (0, length), (37, length))
    check(build_case(geometry(**ONE_LAYER), lengths, seed=2))


@pytest.mark.parametrize("group_size", [1, 3, 4, 8, 16, 20])
def test_group_sizes(group_size: int) -> None:
    check(build_case(geometry(group_size=group_size, **ONE_LAYER), SHORT, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(build_case(geometry(head_dim=head_dim, dtype=dtype, **ONE_LAYER), SHORT, seed=4))


@pytest.mark.parametrize(
    ("sink_size", "window_size"),
    [
        (0, 1),
        (0, 17),
        (0, 64),
        (1, 2),
        (20, 8),  # sinks inside a block
        (32, 32),  # both on tiles' edges
        (33, 31),  # and one off
        (64, 65),  # touching, in contexts of 129
        (100, 40),  # overlapping in some contexts
        (4, 1000),  # nothing is ever dropped
        (0, UNBOUNDED),
    ],
)
def test_policies(sink_size: int, window_size: int) -> None:
    policy = HeadPolicy(sink_size, window_size)
    lengths = ((90, 40), (128, 1), (129, 1), (200, 1), (0, 70))
    check(build_case(geometry(streaming=policy, **ONE_LAYER), lengths, seed=5))


@pytest.mark.parametrize("window", [5, 19, 64])
def test_native_windows(window: int) -> None:
    """A third group, beside retrieval and streaming ones of other layers."""
    check(build_case(geometry(native_windows=(None, window, None)), SHORT, seed=6))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("softcap", "with_sinks"), [(3.0, False), (None, True), (30.0, True)])
def test_softcap_and_learned_sinks(
    softcap: float | None, with_sinks: bool, dtype: torch.dtype
) -> None:
    case = build_case(geometry(dtype=dtype, **ONE_LAYER), SHORT, seed=7)
    sinks = torch.linspace(-2, 5, case.geometry.num_q_heads, dtype=dtype) if with_sinks else None
    check(case, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_large_keys(dtype: torch.dtype) -> None:
    """Products that overflow float16 before they are scaled."""
    case = build_case(geometry(dtype=dtype, head_dim=128, **ONE_LAYER), SHORT, seed=8)
    for query, key in zip(case.query, case.key, strict=True):
        key.mul_(24)
        query.copy_(key.repeat_interleave(case.geometry.group_size, dim=1))
    check(case)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_far_from_zero(cap: float | None) -> None:
    """Of either sign: the running softmax neither overflows nor vanishes."""
    case = build_case(geometry(**ONE_LAYER), SHORT, seed=9)
    for query in case.query:
        query[::2] *= 1e3
        query[1::2] *= -1e3
    check(case, softcap=cap)


@pytest.mark.parametrize(
    ("dtype", "group_size"),
    [(torch.float32, 1), (torch.float32, 4), (torch.float16, 3), (torch.bfloat16, 17)],
)
@pytest.mark.parametrize("policy", [HeadPolicy(4, 24), HeadPolicy(70, 150)])
def test_several_splits(
    dtype: torch.dtype, policy: HeadPolicy, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads with one split beside heads with many, rounds of the merge that are full and not."""
    short_splits(monkeypatch)
    case = build_case(
        geometry(group_size=group_size, streaming=policy, dtype=dtype, **ONE_LAYER),
        ((63, 1), (64, 1), (127, 1), (129, 1), (40, 9), (300, 1)),
        seed=10,
    )
    attention = make_attention(case)
    plan = attention.plan(case.batch)
    # Sequences are decodes first: the retrieval group's splits.
    assert plan.tables[0, :5, 6].tolist() == [1, 2, 2, 3, 5]
    check(case, attention, sinks=torch.linspace(-2, 2, case.geometry.num_q_heads))


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_empty_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split past the last key weighs nothing, also as one of a sequence that needs but one."""
    short_splits(monkeypatch)
    counted = triton_plan.key_span
    monkeypatch.setattr(
        triton_plan, "key_span", lambda *fields: counted(*fields) + triton_plan.SPLIT_KEYS
    )
    case = build_case(geometry(**ONE_LAYER), ((0, 1), (63, 1), (150, 1), (40, 9)), seed=11)
    attention = make_attention(case)
    assert attention.plan(case.batch).tables[0, :3, 6].tolist() == [2, 2, 4]
    check(case, attention, sinks=torch.linspace(-2, 2, case.geometry.num_q_heads))


def test_only_decodes_and_only_chunks() -> None:
    check(build_case(geometry(**ONE_LAYER), ((30, 1), (0, 1)), seed=12))
    check(build_case(geometry(**ONE_LAYER), ((30, 20), (0, 7)), seed=12))


@pytest.mark.parametrize("layout", ["rows", "heads", "fused"])
def test_strides_of_the_query(layout: str) -> None:
    """Rows of heads, heads of rows, or a part of a projection that also holds K and V."""
    case = build_case(geometry(**ONE_LAYER), SHORT, seed=13)
    (query,) = case.query
    if layout == "heads":
        case.query[0] = query.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "fused":
        case.query[0] = torch.cat([query, torch.full_like(query, torch.nan)], dim=1)[
            :, : query.shape[1]
        ]
    assert case.query[0].is_contiguous() == (layout == "rows")
    check(case)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_rows_that_are_not_in_one_piece(head_dim: int) -> None:
    """Heads innermost, or strides that are no multiple of 16: copied first."""
    case = build_case(geometry(head_dim=head_dim, **ONE_LAYER), SHORT, seed=14)
    (expected,) = run(case, make_attention(case))
    for tensors in (case.query, case.key, case.value):
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(case, make_attention(case))[0], expected)
    for tensors in (case.query, case.key, case.value):
        tensors[0] = torch.nn.functional.pad(tensors[0], (0, 3))[:, :, :head_dim]
    assert torch.equal(run(case, make_attention(case))[0], expected)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_batch(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    short_splits(monkeypatch)
    policy = HeadPolicy(data.draw(st.integers(0, 80)), data.draw(st.integers(1, 150)))
    lengths = data.draw(
        st.lists(
            st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 40))),
            min_size=1,
            max_size=4,
        )
    )
    case = build_case(
        geometry(
            streaming=policy,
            block_size=data.draw(st.sampled_from([8, 16, 32, 64])),
            group_size=data.draw(st.integers(1, 5)),
            native_windows=(data.draw(st.sampled_from([None, 7])), None),
            retrieval=((True, False), (False, False)),
        ),
        lengths,
        seed=data.draw(st.integers(0, 100)),
        history_chunk=data.draw(st.integers(1, 40)),
    )
    check(case)
