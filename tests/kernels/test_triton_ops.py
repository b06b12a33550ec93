"""The kernels as PyTorch's operations, and what the Triton path refuses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from headlong.kernels.layout import ArenaLayout, PageLayout, build_arena_layout
from support.paged import build_case
from support.triton import DEVICE, geometry, make_attention, place, run, triton_suite

pytestmark = triton_suite

LENGTHS = ((0, 1), (40, 9), (70, 1))
OPS = ["append_kv", "decode_attention", "prefill_attention"]


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"retrieval": "int4"})],
)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(
    name: str, dtype: torch.dtype, formats: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, fake, autograd registration and tracing, on the arguments of a real step."""
    settings = geometry(dtype=dtype, formats=formats, retrieval=((True, False),))
    case = build_case(settings, LENGTHS, seed=1)
    attention = make_attention(case)
    calls: list[tuple[object, ...]] = []

    def record(operation: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            calls.append(arguments)
            operation(*arguments)

        return call

    where = f"headlong.kernels.triton_attention.{name}"
    operation = getattr(torch.ops.headlong, name)
    monkeypatch.setattr(where, record(operation))
    run(case, attention)
    (arguments,) = calls
    results = torch.library.opcheck(operation.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_is_as_an_eager_one(backend: str) -> None:
    """One graph, in which the arena is changed and read again."""
    case = build_case(geometry(), LENGTHS, seed=2)
    sinks = torch.linspace(-2, 2, case.geometry.num_q_heads, device=DEVICE)
    attention, compiled_attention = make_attention(case), make_attention(case)
    plan = attention.plan(case.batch)
    scale = case.geometry.head_dim**-0.5
    query, key, value = (
        place(each[0]).transpose(0, 1) for each in (case.query, case.key, case.value)
    )

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        compiled_attention.append(0, key + 0, value, plan)
        return 2 * compiled_attention.attend(
            0, query + 0, plan, sm_scale=scale, softcap=20.0, sinks=sinks
        )

    attention.append(0, key, value, plan)
    expected = 2 * attention.attend(0, query, plan, sm_scale=scale, softcap=20.0, sinks=sinks)
    torch.compiler.reset()
    actual = torch.compile(layer, fullgraph=True, backend=backend)(query, key, value)
    assert torch.equal(actual, expected)
    assert torch.equal(compiled_attention.arena, attention.arena)


def test_another_dtype_is_refused() -> None:
    case = build_case(geometry(), LENGTHS, seed=3)
    attention = make_attention(case)
    plan = attention.plan(case.batch)
    query, key, value = (
        place(each[0]).transpose(0, 1) for each in (case.query, case.key, case.value)
    )
    message = "must have the cache's dtype torch.float32, got torch.float16"
    with pytest.raises(ValueError, match=message):
        attention.append(0, key.half(), value, plan)
    with pytest.raises(ValueError, match=message):
        attention.append(0, key, value.half(), plan)
    with pytest.raises(ValueError, match=message):
        attention.attend(0, query.half(), plan, sm_scale=1.0)
    assert torch.equal(attention.arena.cpu(), case.arena)


def make_refused(layout: ArenaLayout) -> None:
    from headlong.kernels.triton_attention import TritonAttention

    TritonAttention(torch.empty(0, dtype=torch.uint8, device=DEVICE), layout, num_q_heads=2)


def layout_of(*pages: PageLayout, num_blocks: int = 4) -> ArenaLayout:
    members = tuple(((0, head),) for head in range(len(pages)))
    return build_arena_layout(members, pages, (num_blocks,) * len(pages))


PAGE = PageLayout(16, 32, torch.float32)


@pytest.mark.parametrize("head_dim", [8, 48, 512])
def test_a_head_size_without_a_kernel_is_refused(head_dim: int) -> None:
    allowed = r"\(16, 32, 64, 80, 96, 112, 128, 192, 256\)"
    with pytest.raises(ValueError, match=f"one of {allowed} for Triton, got {head_dim}"):
        make_refused(layout_of(replace(PAGE, head_dim=head_dim)))


@pytest.mark.parametrize(
    "other",
    [
        replace(PAGE, dtype=torch.float16),
        replace(PAGE, block_size=32),
        replace(PAGE, head_dim=64),
    ],
)
def test_pages_that_differ_are_refused(other: PageLayout) -> None:
    with pytest.raises(ValueError, match="pages of all groups must be alike"):
        make_refused(layout_of(PAGE, other))


def test_slots_that_an_int32_does_not_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 slots"):
        make_refused(layout_of(PAGE, num_blocks=2**27))
    make_refused(layout_of(PAGE, num_blocks=2**27 - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_dtype_without_a_kernel_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype must be one of .* for Triton, got {dtype}"):
        make_refused(layout_of(replace(PAGE, dtype=dtype)))


def test_a_block_size_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be a power of two for Triton, got 24"):
        make_refused(layout_of(replace(PAGE, block_size=24)))
