"""The CPU path against the reference, and the reference against a dense masked attention."""

import pytest
import torch

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference, torch_pages
from headlong.kernels.batch import UNBOUNDED
from headlong.kernels.torch_attention import TorchAttention
from support.compare import TOLERANCES, relative_error
from support.paged import Geometry, PagedCase, build_case

MIXED = ((True, False, False, True), (False, False, True, False), (True, True, True, True))
LENGTHS = ((0, 1), (15, 1), (16, 1), (17, 1), (0, 16), (0, 33), (40, 9), (255, 1), (70, 50))


def geometry(**changes: object) -> Geometry:
    settings: dict[str, object] = {
        "retrieval": MIXED,
        "streaming": HeadPolicy(4, 24),
        "group_size": 2,
        "head_dim": 32,
        "block_size": 16,
        "native_windows": (None, None, None),
    }
    return Geometry(**(settings | changes))  # type: ignore[arg-type]


def check(case: PagedCase, softcap: float | None = None, with_sinks: bool = False) -> None:
    geometry = case.geometry
    attention = TorchAttention(case.arena, case.layout, geometry.num_q_heads)
    plan = attention.plan(case.batch)
    tolerance = TOLERANCES[geometry.dtype]
    sinks = torch.linspace(-2, 2, geometry.num_q_heads) if with_sinks else None
    for layer in range(len(geometry.retrieval)):
        query, key, value = case.query[layer], case.key[layer], case.value[layer]
        expected_arena = case.arena.clone()
        reference.append(expected_arena, case.layout, layer, key, value, case.batch)
        attention.append(layer, key.transpose(0, 1), value.transpose(0, 1), plan)
        assert torch.equal(case.arena, expected_arena)
        scale = geometry.head_dim**-0.5
        options = {"sm_scale": scale, "softcap": softcap, "sinks": sinks}
        expected = reference.attend(query, case.arena, case.layout, layer, case.batch, **options)
        actual = attention.attend(layer, query.transpose(0, 1).contiguous(), plan, **options)
        assert actual.dtype == geometry.dtype
        assert relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_mixed_batch_matches_reference(block_size: int, dtype: torch.dtype) -> None:
    check(build_case(geometry(block_size=block_size, dtype=dtype), LENGTHS, seed=1))


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
def test_group_sizes(group_size: int) -> None:
    check(build_case(geometry(group_size=group_size), LENGTHS, seed=2))


@pytest.mark.parametrize(
    "policy",
    [
        HeadPolicy(0, 1),
        HeadPolicy(0, 17),
        HeadPolicy(1, 16),
        HeadPolicy(20, 8),
        HeadPolicy(64, 1000),
        HeadPolicy(0, UNBOUNDED),
    ],
)
def test_policies(policy: HeadPolicy) -> None:
    check(build_case(geometry(streaming=policy), LENGTHS, seed=3))


def test_native_windows_softcap_and_sinks() -> None:
    case = build_case(geometry(native_windows=(None, 19, 5)), LENGTHS, seed=4)
    check(case, softcap=3.0, with_sinks=True)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_large_keys(dtype: torch.dtype) -> None:
    """Products that overflow float16 before they are scaled."""
    case = build_case(geometry(dtype=dtype, head_dim=128), LENGTHS, seed=8)
    for query, key in zip(case.query, case.key, strict=True):
        key.mul_(24)
        query.copy_(key.repeat_interleave(case.geometry.group_size, dim=1))
    check(case)


def test_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile boundaries inside prefill chunks and inside decodes."""
    monkeypatch.setattr(torch_pages, "TILE_BYTES", 1)
    monkeypatch.setattr("headlong.kernels.torch_plan.PREFILL_TILE_ROWS", 16)
    check(build_case(geometry(), LENGTHS, seed=5), softcap=5.0, with_sinks=True)


def test_reference_matches_dense_attention() -> None:
    """One sequence from its first token: nothing paged about the expected value."""
    case = build_case(geometry(), ((0, 90),), seed=6)
    scale = case.geometry.head_dim**-0.5
    for layer, labels in enumerate(case.geometry.retrieval):
        query, key, value = (each[layer].double() for each in (case.query, case.key, case.value))
        reference.append(case.arena, case.layout, layer, case.key[layer], value, case.batch)
        actual = reference.attend(
            case.query[layer], case.arena, case.layout, layer, case.batch, sm_scale=scale
        )
        for head, keeps_all in enumerate(labels):
            t = torch.arange(90)
            mask = t[None, :] <= t[:, None]
            if not keeps_all:
                mask &= (t[None, :] < 4) | (t[None, :] > t[:, None] - 24)
            for q_head in (2 * head, 2 * head + 1):
                dense = torch.nn.functional.scaled_dot_product_attention(
                    query[:, q_head], key[:, head], value[:, head], attn_mask=mask, scale=scale
                )
                assert relative_error(actual[:, q_head], dense) <= 1e-12


@pytest.mark.parametrize("edge", ["window", "causal", "sink"])
def test_a_law_off_by_one_is_caught(edge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance table is worth something: a law that is one token off fails it."""

    def wrong(t: torch.Tensor, j: torch.Tensor, sink: int, window: int) -> torch.Tensor:
        t, j = t.long()[:, None], j.long()[None, :]
        late = 1 if edge == "causal" else 0
        wide = 1 if edge == "window" and window < UNBOUNDED else 0
        more = 1 if edge == "sink" and sink else 0
        return (j <= t + late) & ((j < sink - more) | (j > t - window - wide))

    case = build_case(geometry(), LENGTHS, seed=7)
    monkeypatch.setattr("headlong.kernels.torch_plan.visible", wrong)
    with pytest.raises(AssertionError):
        check(case)
