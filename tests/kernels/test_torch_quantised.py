"""The CPU path over quantised pages: against the reference over the same codes, and the loss."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference, torch_pages
from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.layout import QUANTISATIONS, view_pages
from headlong.kernels.torch_attention import TorchAttention
from headlong.kernels.torch_pages import GroupPages, Tile
from support.compare import relative_error
from support.paged import Geometry, PagedCase, build_case

FORMATS = ("int8", "fp8", "int4")
KINDS = ("retrieval", "streaming", "sliding")

TOLERANCES = {
    torch.float32: {"int8": 1e-6, "fp8": 1e-6, "int4": 1e-6},
    torch.float16: {"int8": 1e-3, "fp8": 1e-3, "int4": 1e-3},
    torch.bfloat16: {"int8": 5e-3, "fp8": 5e-3, "int4": 5e-3},
}
"""Of attention against the reference over the same codes: what the computing dtype costs."""

LOSSES = {"int8": 0.012, "fp8": 0.05, "int4": 0.18}
"""Of attention against the reference over pages that are not quantised: normal K and V."""

LENGTHS = ((0, 1), (15, 1), (16, 1), (0, 17), (40, 9), (70, 1))


def geometry(quantised: str | Mapping[str, str], **changes: object) -> Geometry:
    settings: dict[str, object] = {
        "retrieval": ((True, False),),
        "streaming": HeadPolicy(4, 24),
        "group_size": 2,
        "head_dim": 32,
        "block_size": 16,
        "native_windows": (None,),
        "formats": dict.fromkeys(KINDS, quantised) if isinstance(quantised, str) else quantised,
    }
    return Geometry(**(settings | changes))  # type: ignore[arg-type]


def append_and_attend(
    case: PagedCase, softcap: float | None = None, with_sinks: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What came out of each layer, and what should have; the arena is checked on the way."""
    geometry = case.geometry
    attention = TorchAttention(case.arena, case.layout, geometry.num_q_heads)
    plan = attention.plan(case.batch)
    sinks = torch.linspace(-2, 2, geometry.num_q_heads) if with_sinks else None
    options = {"sm_scale": geometry.head_dim**-0.5, "softcap": softcap, "sinks": sinks}
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in range(len(geometry.retrieval)):
        query, key, value = case.query[layer], case.key[layer], case.value[layer]
        expected_arena = case.arena.clone()
        reference.append(expected_arena, case.layout, layer, key, value, case.batch)
        attention.append(layer, key.transpose(0, 1), value.transpose(0, 1), plan)
        assert torch.equal(case.arena, expected_arena)
        actual = attention.attend(layer, query.transpose(0, 1).contiguous(), plan, **options)
        assert actual.dtype == geometry.dtype
        expected = reference.attend(query, case.arena, case.layout, layer, case.batch, **options)
        found.append((actual, expected))
    return found


def check(case: PagedCase, softcap: float | None = None, with_sinks: bool = False) -> None:
    table = TOLERANCES[case.geometry.dtype]
    tolerance = max(table[name] for name in case.geometry.formats.values())
    for actual, expected in append_and_attend(case, softcap, with_sinks):
        assert relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_each_format_matches_reference(dtype: torch.dtype, name: str) -> None:
    check(build_case(geometry(name, dtype=dtype), LENGTHS, seed=1))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 80), (16, 96), (64, 64), (32, 10)])
def test_page_shapes(name: str, block_size: int, head_dim: int) -> None:
    check(build_case(geometry(name, block_size=block_size, head_dim=head_dim), LENGTHS, seed=2))


@pytest.mark.parametrize(
    "formats",
    [
        {"retrieval": "int4"},
        {"streaming": "fp8"},
        {"retrieval": "int4", "streaming": "int8", "sliding": "fp8"},
    ],
)
def test_groups_of_different_formats(formats: dict[str, str]) -> None:
    case = geometry(
        formats,
        retrieval=((True, False), (True, True), (False, True)),
        native_windows=(None, None, 19),
        dtype=torch.bfloat16,
    )
    check(build_case(case, LENGTHS, seed=3))


@pytest.mark.parametrize("policy", [HeadPolicy(0, 1), HeadPolicy(20, 8), HeadPolicy(0, UNBOUNDED)])
def test_policies(policy: HeadPolicy) -> None:
    check(build_case(geometry("int4", streaming=policy), LENGTHS, seed=4))


@pytest.mark.parametrize("name", FORMATS)
def test_softcap_and_sinks(name: str) -> None:
    check(build_case(geometry(name, group_size=3), LENGTHS, seed=5), softcap=3.0, with_sinks=True)


@pytest.mark.parametrize("name", FORMATS)
def test_small_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile boundaries inside prefill chunks and inside decodes."""
    monkeypatch.setattr(torch_pages, "TILE_BYTES", 1)
    monkeypatch.setattr("headlong.kernels.torch_plan.PREFILL_TILE_ROWS", 16)
    check(build_case(geometry(name), LENGTHS, seed=6))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_lost(name: str) -> None:
    quantised = build_case(geometry(name), LENGTHS, seed=7)
    plain = build_case(geometry({}), LENGTHS, seed=7)
    ((actual, _),), ((_, expected),) = append_and_attend(quantised), append_and_attend(plain)
    error = relative_error(actual, expected)
    # The other half: a format that loses next to nothing was not used.
    assert LOSSES[name] / 4 <= error <= LOSSES[name]


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_read_as_the_number_that_it_is(name: str) -> None:
    """All 256 bytes, through pages with a scale of 1."""
    case = geometry(name, head_dim=256 * 8 // QUANTISATIONS[name].element_bits, block_size=8)
    layout = build_case(case, ((0, 1),), seed=0).layout
    arena = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    views = view_pages(layout, arena, 0)
    assert views.scales is not None
    views.keys[0, 0] = torch.arange(256, dtype=torch.uint8)
    views.scales[0, 0] = 1.0
    tile = GroupPages(layout, arena, 0).tile(torch_pages.KEYS, torch.tensor([[0]]))
    expected = reference_numbers(views.keys[0, 0], name)
    known = expected.isfinite()
    assert torch.equal(tile.restore()[0][known], expected[known])
    # What a masked key's slot may hold must not reach the sum: 0 * NaN is NaN.
    assert tile.codes.isfinite().all()


def reference_numbers(packed: torch.Tensor, name: str) -> torch.Tensor:
    if name == "int4":
        return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2).float()
    return packed.view(torch.int8 if name == "int8" else torch.float8_e4m3fn).float()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("constant", [0.0, -7.25, 1e-6, 6e4])
def test_constant_vectors_come_back(name: str, constant: float) -> None:
    case = build_case(geometry(name, retrieval=((True,),)), ((0, 9),), seed=8)
    constants = torch.full_like(case.key[0], constant).transpose(0, 1)
    attention = TorchAttention(case.arena, case.layout, case.geometry.num_q_heads)
    attention.append(0, constants, -constants, attention.plan(case.batch))
    pages = GroupPages(case.layout, case.arena, 0)
    number = case.batch.groups[0].block_tables[:, :1].long()
    for which, sign in ((torch_pages.KEYS, 1), (torch_pages.VALUES, -1)):
        back = pages.read(which, number, torch.float32)[0, :9]
        # The least float16 is 6e-8, and a scale may be half of it away.
        assert torch.allclose(sign * back, constants[0], rtol=1e-3, atol=448 * 3e-8)


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_float16_does_not_come_back_infinite(name: str) -> None:
    """65504 / 127 is rounded up to 516, and 127 * 516 is no float16."""
    case = build_case(geometry(name, retrieval=((True,),), dtype=torch.float16), ((0, 9),), seed=8)
    largest = torch.full_like(case.key[0], torch.finfo(torch.float16).max)
    largest[..., ::2] *= -1
    attention = TorchAttention(case.arena, case.layout, case.geometry.num_q_heads)
    plan = attention.plan(case.batch)
    attention.append(0, largest.transpose(0, 1), largest.transpose(0, 1), plan)
    query = torch.zeros_like(case.query[0]).transpose(0, 1).contiguous()
    out = attention.attend(0, query, plan, sm_scale=1.0)
    assert relative_error(out[:, 0], largest[:, 0].double()) <= LOSSES[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_strange_vectors_stay_inside_their_token(name: str, strange: float) -> None:
    """One head of one token is all NaN, infinite or beyond float16."""
    case = build_case(geometry(name, dtype=torch.bfloat16), LENGTHS, seed=8)
    row, head, seq = 5, 0, 3
    mine = slice(*case.batch.cu_seqlens_q.tolist()[seq : seq + 2])
    assert mine.start <= row < mine.stop

    def run(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arena = case.arena.clone()
        attention = TorchAttention(arena, case.layout, case.geometry.num_q_heads)
        plan = attention.plan(case.batch)
        attention.append(0, key.transpose(0, 1), value.transpose(0, 1), plan)
        query = case.query[0].transpose(0, 1).contiguous()
        return arena, attention.attend(0, query, plan, sm_scale=0.2)

    arena, out = run(case.key[0], case.value[0])
    key, value = case.key[0].clone(), case.value[0].clone()
    key[row, head] = value[row, head] = strange
    strange_arena, strange_out = run(key, value)

    assert not torch.equal(strange_arena, arena)
    group, page = case.layout.head_page(0, head)
    slot = int(case.batch.groups[group].slot_mapping[row])
    block, offset = divmod(slot, case.geometry.block_size)
    for each in (arena, strange_arena):
        views = view_pages(case.layout, each, group)
        views.keys[block, page, offset] = 0
        views.values[block, page, offset] = 0
        for section in (views.scales, views.minima):
            if section is not None:
                section[block, page, :, offset] = 0
    assert torch.equal(strange_arena, arena)

    assert torch.equal(strange_out[:, 2:], out[:, 2:])
    assert torch.equal(strange_out[: mine.start], out[: mine.start])
    assert torch.equal(strange_out[mine.stop :], out[mine.stop :])


def swapped_nibbles(elements: torch.Tensor, *rest: object) -> None:
    _UNPACK(elements, *rest)  # type: ignore[arg-type]
    pairs = elements.view(-1, 2)
    pairs.copy_(pairs.flip(1))


def without(section: str) -> Callable[..., Tile]:
    def tile(*args: object) -> Tile:
        found = _TILE(*args)  # type: ignore[arg-type]
        return replace(found, **{section: torch.full_like(getattr(found, section), 0.3)})

    return tile


_UNPACK = torch_pages._unpack_into
_TILE = GroupPages.tile


@pytest.mark.parametrize("bug", ["nibbles", "scales", "minima", "unit"])
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance table is worth something."""
    name = "fp8" if bug == "unit" else "int4"
    if bug == "nibbles":
        monkeypatch.setattr(torch_pages, "_unpack_into", swapped_nibbles)
    elif bug == "unit":
        monkeypatch.setattr(torch_pages, "FP8_UNIT", 1.0)
    else:
        monkeypatch.setattr(GroupPages, "tile", without(bug))
    case = build_case(geometry(name), LENGTHS, seed=9)
    with pytest.raises(AssertionError, match="relative_error"):
        check(case)
