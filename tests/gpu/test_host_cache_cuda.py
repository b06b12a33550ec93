"""Blocks between a CUDA device and the host, on streams beside the one that computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headlong.cache.tiered_cache import TieredCache
from headlong.cache.transfers import Move, PinnedBuffer, StreamMover
from headlong.kernels.layout import PageLayout, build_arena_layout
from support.engines import build_engine, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_BLOCKS = 64


def test_blocks_go_out_and_come_back_while_others_are_written() -> None:
    members = (tuple((0, head) for head in range(64)),)
    layout = build_arena_layout(members, (PageLayout(64, 128, torch.bfloat16),), (2 * NUM_BLOCKS,))
    arena = torch.randint(0, 256, (layout.total_bytes,), dtype=torch.uint8, device="cuda")
    before = arena.cpu()
    host = PinnedBuffer(NUM_BLOCKS * layout.block_bytes(0), pinned=True)
    assert host.memory.is_pinned()
    mover = StreamMover(arena, layout, host.memory)
    out = [Move(0, block, block * layout.block_bytes(0)) for block in range(NUM_BLOCKS)]
    back = [Move(0, NUM_BLOCKS + move.block, move.offset) for move in out]
    blocks = layout.view_group(arena, 0)
    mover.store(out)
    mover.fence()
    # The next step overwrites at once what is on its way, and what the load will fill is zeroed.
    blocks.zero_()
    mover.load(back)
    transfers = []
    while len(transfers) < 2:
        mover.wait(10)
        transfers += mover.finished()
    assert [each.to_host for each in transfers] == [True, False]
    assert all(each.seconds > 0 for each in transfers)
    expected = layout.view_group(before, 0)[:NUM_BLOCKS]
    assert torch.equal(blocks[NUM_BLOCKS:].cpu(), expected)
    assert not blocks[:NUM_BLOCKS].any()
    mover.close()
    host.close()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_prompts_come_back_from_the_host(
    tiny_model: Callable[[str], Path], tmp_path: Path, backend: str
) -> None:
    folder = tiny_model("llama")
    profile = str(random_profile(folder, tmp_path / "profile.json", seed=1))
    settings: dict[str, object] = {
        "device": "cuda", "dtype": "float32", "attention_backend": backend, "profile": profile,
    }  # fmt: skip
    prompts = random_prompts([200, 150, 220, 180, 90, 260], VOCAB_SIZE)
    roomy = build_engine(folder, enable_prefix_caching=False, **settings)
    expected = run(roomy, prompts)
    engine = build_engine(
        folder,
        kv_cache_memory_bytes=roomy.plan.full_sequence_bytes(300) * 2,
        block_size=16,
        max_model_len=300,
        host_cache_bytes=8 << 20,
        disk_cache_dir=str(tmp_path / "disk"),
        **settings,
    )
    for _ in range(3):
        assert run(engine, prompts) == expected
    while engine.idle_step():
        pass
    assert isinstance(engine.cache, TieredCache)
    engine.cache.check_integrity()
    assert engine.stats().tiers.loaded_tokens > 0
    assert engine.stats().tiers.disk_bytes > 0
    engine.close()
