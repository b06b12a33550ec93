"""DuoAttention's setting of 3.3 million tokens: the arena that `headlong plan` makes of it.

Llama-3-8B's pages in 4 bits, half of the heads streaming. The geometry runs here with few blocks;
and a whole arena is mapped, of which only some pages at its end are touched.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import ArenaLayout, build_slab_layout
from headlong.kernels.torch_attention import TorchAttention
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.gpus import find_gpu
from headlong.server.engine.sizing import CacheSizing, EvenHeads, SizingRequest, size_model
from support.compare import TOLERANCES, relative_error
from support.llama3 import write_config
from support.paged import Geometry, PagedCase, build_case

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
LABELS = tuple(((False,) * 4 + (True,) * 4) for _ in range(NUM_LAYERS))
GEOMETRY = Geometry(
    retrieval=LABELS,
    streaming=HeadPolicy(128, 256),
    group_size=4,
    head_dim=HEAD_DIM,
    block_size=BLOCK_SIZE,
    native_windows=(None,) * NUM_LAYERS,
    dtype=torch.bfloat16,
    formats={"retrieval": "int4", "streaming": "int4"},
)
# (cached, new): a decode past its window, a chunk that goes on, and a first one.
LENGTHS = ((450, 1), (40, 9), (0, 20))
SOME_LAYERS = (0, 13, 31)
INT32 = 2**31


@pytest.fixture(scope="module")
def case() -> PagedCase:
    write = reference.append

    def write_some(
        arena: torch.Tensor, layout: ArenaLayout, layer: int, *rest: torch.Tensor | AttentionBatch
    ) -> None:
        if layer in SOME_LAYERS:
            write(arena, layout, layer, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "append", write_some)
        return build_case(GEOMETRY, LENGTHS, seed=1, history_chunk=225)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> CacheSizing:
    """What `headlong plan` says for an 80 GB GPU."""
    path = write_config(tmp_path_factory.mktemp("plan"), max_position_embeddings=1 << 22)
    config = EngineConfig(model=str(path), quantization="int8wo", kv_cache_dtype="int4")
    request = SizingRequest(
        config=config, gpu=find_gpu("a100-80g"), even=EvenHeads(0.5), lengths=(3_300_000,)
    )
    return size_model(request).own


def attend(
    arena: torch.Tensor, layout: ArenaLayout, batch: AttentionBatch, case: PagedCase
) -> list[torch.Tensor]:
    """Append the new tokens of some layers and attend to them, as the CPU's backend does."""
    attention = TorchAttention(arena, layout, GEOMETRY.num_q_heads)
    plan = attention.plan(batch)
    made = []
    for layer in SOME_LAYERS:
        query, key, value = (each[layer] for each in (case.query, case.key, case.value))
        attention.append(layer, key.transpose(0, 1), value.transpose(0, 1), plan)
        rows = query.transpose(0, 1).contiguous()
        made.append(attention.attend(layer, rows, plan, sm_scale=HEAD_DIM**-0.5))
    return made


def test_the_plan_holds_3_3_million_tokens_in_such_pages(
    planned: CacheSizing, case: PagedCase
) -> None:
    assert (planned.max_context_tokens or 0) >= 3_300_000
    assert planned.sequences[3_300_000] == 1
    assert planned.plan.holds(1, 3_300_000)
    shape = planned.shape
    assert [group.members for group in shape.groups] == [each.members for each in GEOMETRY.groups]
    assert tuple(map(shape.page, shape.groups)) == case.layout.pages
    for group in range(2):
        # 4 layers' worth of heads of each kind; codes, scales and minima of K and of V.
        assert case.layout.block_bytes(group) == NUM_LAYERS * 4 * BLOCK_SIZE * 2 * (64 + 4)
    # Tokens of a group are numbered in 32 bits.
    assert max(planned.plan.num_blocks) * BLOCK_SIZE < INT32


def test_the_geometry_runs_with_few_blocks(case: PagedCase) -> None:
    arena, expected_arena = case.arena.clone(), case.arena.clone()
    outputs = attend(arena, case.layout, case.batch, case)
    for layer, actual in zip(SOME_LAYERS, outputs, strict=True):
        query, key, value = (each[layer] for each in (case.query, case.key, case.value))
        reference.append(expected_arena, case.layout, layer, key, value, case.batch)
        expected = reference.attend(
            query, expected_arena, case.layout, layer, case.batch, sm_scale=HEAD_DIM**-0.5
        )
        assert relative_error(actual, expected) <= TOLERANCES[torch.bfloat16]
    assert torch.equal(arena, expected_arena)


@pytest.mark.parametrize("total_bytes", [66 * 10**9, 150 * 10**9])
def test_pages_lie_right_at_the_end_of_a_whole_arena(
    case: PagedCase, planned: CacheSizing, tmp_path: Path, total_bytes: int
) -> None:
    """An arena in a file that has holes: as large as that of a GPU, and only touched pages exist.

    66 GB is that of 3.3 million tokens on 80 GB; 150 GB is beyond 2**36 bytes, on larger GPUs.
    """
    slab_bytes = planned.plan.slab_bytes
    whole = build_slab_layout(
        members=tuple(group.members for group in GEOMETRY.groups),
        pages=case.layout.pages,
        slab_bytes=slab_bytes,
        num_slabs=total_bytes // slab_bytes,
    )
    path = str(tmp_path / "arena")
    arena = torch.from_file(path, shared=True, size=whole.total_bytes, dtype=torch.uint8)
    # The last blocks of all for one group, and those before them for the other.
    (few, _) = case.layout.num_blocks
    firsts = [whole.num_blocks[group] - (group + 1) * few for group in range(2)]
    for group, first in enumerate(firsts):
        assert first * whole.block_bytes(group) > total_bytes - 2**28 > INT32
        blocks = whole.view_group(arena, group)[first : first + few]
        blocks.copy_(case.layout.view_group(case.arena, group))
    groups = tuple(
        replace(
            each,
            block_tables=each.block_tables + first,
            slot_mapping=each.slot_mapping + first * BLOCK_SIZE,
        )
        for each, first in zip(case.batch.groups, firsts, strict=True)
    )
    small_arena = case.arena.clone()
    expected = attend(small_arena, case.layout, case.batch, case)
    actual = attend(arena, whole, replace(case.batch, groups=groups), case)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
    for group, first in enumerate(firsts):
        start = first * whole.block_bytes(group)
        got = arena[start : start + few * whole.block_bytes(group)]
        assert torch.equal(got, case.layout.view_group(small_arena, group).flatten())
