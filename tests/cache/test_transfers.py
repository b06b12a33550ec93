import threading

import pytest
import torch

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.transfers import Move, PinnedBuffer, ThreadMover, Transfer
from headlong.kernels.layout import ArenaLayout
from support.caches import build_cache


@pytest.fixture
def layout() -> ArenaLayout:
    policies = {"retrieval": RETRIEVAL, "streaming": HeadPolicy(1, 3)}
    return build_cache(policies, [6, 4]).layout


@pytest.fixture
def arena(layout: ArenaLayout) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (layout.total_bytes,), dtype=torch.uint8)


def collect(mover: ThreadMover, count: int) -> list[Transfer]:
    found: list[Transfer] = []
    while len(found) < count:
        mover.wait(10)
        found += mover.finished()
    return found


def test_bytes_go_out_and_come_back(layout: ArenaLayout, arena: torch.Tensor) -> None:
    before = arena.clone()
    host = PinnedBuffer(2000, pinned=False)
    size = layout.block_bytes(0)
    mover = ThreadMover(arena, layout, host.memory)
    out = [Move(0, 5, 0), Move(1, 2, 3 * size)]
    mover.store(out)
    mover.fence()
    arena.zero_()
    mover.load([Move(0, 1, 0), Move(1, 0, 3 * size)])
    stored, loaded = collect(mover, 2)
    assert (stored.to_host, loaded.to_host) == (True, False)
    assert stored.moves == tuple(out)
    assert stored.num_bytes == loaded.num_bytes == size + layout.block_bytes(1)
    for group, source, target in ((0, 5, 1), (1, 2, 0)):
        old, new = layout.view_group(before, group), layout.view_group(arena, group)
        assert torch.equal(new[target], old[source])
        assert int(new.count_nonzero()) == int(old[source].count_nonzero())
    mover.close()
    host.close()


def test_a_load_comes_after_the_stores_before_it(layout: ArenaLayout, arena: torch.Tensor) -> None:
    """It may read where one still writes, and write where one still reads."""
    before = layout.view_group(arena, 0).clone()
    mover = ThreadMover(arena, layout, torch.zeros(2000, dtype=torch.uint8))
    gate = threading.Event()
    mover._storing.submit(gate.wait)
    mover.store([Move(0, 0, 0)])
    mover.load([Move(0, 1, 0)])
    mover.wait(0.01)
    assert mover.finished() == []
    gate.set()
    collect(mover, 2)
    assert torch.equal(layout.view_group(arena, 0)[1], before[0])
    mover.close()


def test_a_slow_load_holds_up_no_store(layout: ArenaLayout, arena: torch.Tensor) -> None:
    mover = ThreadMover(arena, layout, torch.zeros(2000, dtype=torch.uint8))
    gate = threading.Event()
    mover._loading.submit(gate.wait)
    mover.load([Move(0, 1, 0)])
    mover.store([Move(0, 0, 0)])
    mover.fence()
    (stored,) = collect(mover, 1)
    assert stored.to_host
    gate.set()
    (loaded,) = collect(mover, 1)
    assert not loaded.to_host
    mover.close()


def test_what_waits_is_dropped_at_the_end(layout: ArenaLayout, arena: torch.Tensor) -> None:
    before = arena.clone()
    mover = ThreadMover(arena, layout, torch.zeros(2000, dtype=torch.uint8))
    started, gate = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        gate.wait(10)

    mover._loading.submit(block)
    started.wait(10)
    mover.load([Move(0, 1, 0)])
    threading.Timer(0.02, gate.set).start()
    mover.close()
    assert torch.equal(arena, before)


def test_memory_that_is_not_there() -> None:
    with pytest.raises(MemoryError, match="more than the host"):
        PinnedBuffer(1 << 60, pinned=False)
