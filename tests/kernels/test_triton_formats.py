"""Quantised pages on the Triton path: appended byte for byte, attended as the reference says."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference
from headlong.kernels.codes import unpack
from headlong.kernels.layout import QUANTISATIONS, view_pages
from support.compare import TOLERANCES
from support.paged import PagedCase, build_case
from support.triton import check, geometry, make_attention, place, short_splits, triton_suite

pytestmark = triton_suite

SHORT = ((0, 1), (40, 9), (70, 1), (0, 18))
ONE_LAYER = {"retrieval": ((True, False),)}
FORMATS = list(QUANTISATIONS)
ALIKE = [dict.fromkeys(("retrieval", "streaming", "sliding"), name) for name in FORMATS]
MIXED: list[dict[str, str]] = [
    {"retrieval": "int4"},
    {"streaming": "fp8"},
    {"retrieval": "int4", "streaming": "int8"},
    {"retrieval": "fp8", "streaming": "int4"},
]


def of(formats: Mapping[str, str]) -> str:
    return ",".join(f"{kind}={name}" for kind, name in formats.items())


def append(case: PagedCase, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The arena after a layer's K and V were appended, and as the reference leaves it."""
    attention = make_attention(case)
    key, value = (place(each[layer]).transpose(0, 1) for each in (case.key, case.value))
    attention.append(layer, key, value, attention.plan(case.batch))
    expected = case.arena.clone()
    reference.append(expected, case.layout, layer, case.key[layer], case.value[layer], case.batch)
    return attention.arena.cpu(), expected


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [(torch.float32, 16, 8), (torch.bfloat16, 80, 64), (torch.float16, 128, 16)],
)
@pytest.mark.parametrize("formats", [*ALIKE, MIXED[0]], ids=of)
def test_appended_bytes_are_as_the_reference_says(
    formats: dict[str, str], dtype: torch.dtype, head_dim: int, block_size: int
) -> None:
    chosen = geometry(
        formats=formats, dtype=dtype, head_dim=head_dim, block_size=block_size, **ONE_LAYER
    )
    case = build_case(chosen, ((0, 1), (15, 1), (9, 17)), seed=1)
    actual, expected = append(case)
    assert not torch.equal(expected, case.arena)
    assert torch.equal(actual, expected)


def halfway(name: str) -> torch.Tensor:
    """All numbers that codes stand for at scale 1, and what lies in the middle between two."""
    if name == "fp8":
        codes = torch.arange(127, dtype=torch.uint8)
        numbers = unpack(codes, QUANTISATIONS[name])
        numbers = torch.cat([-numbers, numbers[1:]]).sort().values
    else:
        numbers = torch.arange(-127.0, 128.0) if name == "int8" else torch.arange(16.0)
    middles = torch.tensor([(one + other) / 2 for one, other in pairwise(numbers.tolist())])
    return torch.cat([numbers, middles])


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest_and_the_even_one_of_two(name: str) -> None:
    case = build_case(
        geometry(formats={"retrieval": name}, head_dim=16, retrieval=((True, True),)),
        ((0, 60),),
        seed=2,
    )
    numbers = halfway(name)
    edges = torch.stack([numbers.min(), numbers.max()])
    for tensor in (*case.key, *case.value):
        rows = tensor.view(-1, 16)
        rows[:, :2] = edges  # These make the scale 1.
        rest = numbers.repeat(-(-rows[:, 2:].numel() // len(numbers)))
        rows[:, 2:] = rest[: rows[:, 2:].numel()].view(-1, 14)
    actual, expected = append(case)
    assert torch.equal(actual, expected)
    scales = view_pages(case.layout, actual, 0).scales
    assert scales is not None
    assert scales[case.sequences[0].tables[0].blocks[0]].eq(1).all()


@pytest.mark.parametrize("name", FORMATS)
def test_vectors_without_a_scale_and_with_the_largest(name: str) -> None:
    """Zeros, constants, what underflows and what overflows float16."""
    case = build_case(geometry(formats={"retrieval": name}, **ONE_LAYER), ((0, 12),), seed=3)
    for tensor in (*case.key, *case.value):
        tensor[0] = 0.0
        tensor[1] = 0.1
        tensor[2] = -3.0
        tensor[3] *= 1e-8
        tensor[4] *= 4e-6
        tensor[5] *= 1e7
        tensor[6] *= 1e30
        tensor[7] = torch.finfo(torch.float32).max
        tensor[8, :, ::2] = -torch.finfo(torch.float32).max
        tensor[9] = -0.0
        tensor[10, :, 1:] = 1e-30
    actual, expected = append(case)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_stays_with_its_token(name: str, wrong: float) -> None:
    case = build_case(geometry(formats={"retrieval": name}, **ONE_LAYER), ((0, 12),), seed=4)
    for tensor in (*case.key, *case.value):
        tensor[5, 0, 7] = wrong
    actual, expected = append(case)
    for arena in (actual, expected):
        pages = view_pages(case.layout, arena, 0)
        block = case.sequences[0].tables[0].blocks[0]
        for section in (pages.keys[block, 0], pages.values[block, 0]):
            section[5] = 0
        for both in (pages.scales, pages.minima):
            if both is not None:
                both[block, 0, :, 5] = 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("formats", ALIKE + MIXED, ids=of)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_dtypes(dtype: torch.dtype, formats: dict[str, str]) -> None:
    check(build_case(geometry(dtype=dtype, formats=formats, **ONE_LAYER), SHORT, seed=5))


@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 64), (64, 8), (80, 32), (256, 16)])
def test_head_dims_and_block_sizes(head_dim: int, block_size: int) -> None:
    for formats in MIXED[2:]:
        chosen = geometry(formats=formats, head_dim=head_dim, block_size=block_size, **ONE_LAYER)
        check(build_case(chosen, SHORT, seed=6))


@pytest.mark.parametrize("name", FORMATS)
def test_softcap_and_learned_sinks(name: str) -> None:
    case = build_case(geometry(formats={"retrieval": name}, **ONE_LAYER), SHORT, seed=7)
    sinks = torch.linspace(-2, 5, case.geometry.num_q_heads)
    check(case, softcap=3.0, sinks=sinks)


@pytest.mark.parametrize("formats", MIXED[2:], ids=of)
def test_several_splits(formats: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    short_splits(monkeypatch)
    policy = HeadPolicy(20, 90)
    case = build_case(
        geometry(formats=formats, streaming=policy, group_size=17, **ONE_LAYER),
        ((63, 1), (129, 1), (40, 9), (200, 1)),
        seed=8,
    )
    check(case, sinks=torch.linspace(-2, 2, case.geometry.num_q_heads))


def test_three_formats_at_once() -> None:
    """Of retrieval and streaming heads, and of a model's own window in another layer."""
    formats = {"retrieval": "int4", "streaming": "fp8", "sliding": "int8"}
    check(build_case(geometry(formats=formats, native_windows=(None, 19, None)), SHORT, seed=9))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_every_fp8_code(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a device that has no instruction for them."""
    for module in ("triton_decode", "triton_prefill"):
        monkeypatch.setattr(f"headlong.kernels.{module}.has_fp8", lambda capability: native)
    chosen = geometry(formats=ALIKE[1], dtype=dtype, head_dim=64, **ONE_LAYER)
    case = build_case(chosen, ((60, 1), (90, 9)), seed=10)
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    for group in range(case.layout.num_groups):
        pages = view_pages(case.layout, case.arena, group)
        for section in (pages.keys, pages.values):
            repeated = numbers.repeat(-(-section.numel() // len(numbers)))[: section.numel()]
            section.copy_(repeated.view(section.shape))
    check(case)


@pytest.mark.parametrize("name", FORMATS)
def test_float16_keeps_the_weights_of_small_scales(name: str) -> None:
    """Where nearly all of the result comes from keys of little weight each."""
    case = build_case(
        geometry(formats={"retrieval": name}, dtype=torch.float16, **ONE_LAYER),
        ((200, 1), (100, 5)),
        seed=11,
    )
    pages = view_pages(case.layout, case.arena, 0)
    for both in (pages.scales, pages.minima):
        if both is not None:
            both[:, :, 1] *= 2.0**-10
    for key, query, value in zip(case.key, case.query, case.value, strict=True):
        query.copy_(key.repeat_interleave(case.geometry.group_size, dim=1) * 1.5)
        value.mul_(2.0**-10)
    check(case)


@settings(
    max_examples=5,
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
            max_size=3,
        )
    )
    kinds = st.sampled_from(["retrieval", "streaming", "sliding"])
    case = build_case(
        geometry(
            streaming=policy,
            formats=data.draw(st.dictionaries(kinds, st.sampled_from(FORMATS))),
            dtype=data.draw(st.sampled_from(list(TOLERANCES))),
            block_size=data.draw(st.sampled_from([8, 16, 64])),
            group_size=data.draw(st.integers(1, 5)),
            native_windows=(data.draw(st.sampled_from([None, 7])), None),
            retrieval=((True, False), (False, False)),
        ),
        lengths,
        seed=data.draw(st.integers(0, 100)),
        history_chunk=data.draw(st.integers(1, 40)),
    )
    check(case)
