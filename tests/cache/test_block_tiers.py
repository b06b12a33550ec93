from pathlib import Path

import pytest
import torch

from headlong.cache.block_files import block_shapes
from headlong.cache.block_tiers import BlockTiers
from headlong.cache.disk_tier import DiskTier
from headlong.cache.policy import RETRIEVAL
from headlong.cache.transfers import ThreadMover
from headlong.kernels.layout import ArenaLayout
from support.caches import build_cache
from support.lazy_mover import LazyMover

KEYS = [bytes([index]) * 32 for index in range(20)]


@pytest.fixture
def layout() -> ArenaLayout:
    return build_cache({"retrieval": RETRIEVAL}, [12]).layout


class Memory:
    """An arena whose block b is full of b + 1, tiers behind it, and what they hold."""

    def __init__(self, layout: ArenaLayout, num_slots: int, disk: DiskTier | None = None) -> None:
        arena = torch.zeros(layout.total_bytes, dtype=torch.uint8)
        self.blocks = layout.view_group(arena, 0)
        for block, page in enumerate(self.blocks):
            page.fill_(block + 1)
        self.host = torch.zeros(num_slots * layout.block_bytes(0), dtype=torch.uint8)
        self.mover = LazyMover(arena, layout, self.host)
        self.tiers = BlockTiers(layout, self.host, self.mover, disk)

    def held(self, key: bytes) -> int:
        slot = self.tiers.host.find(0, key)
        assert slot is not None
        (value,) = set(self.host[slot.offset : slot.offset + self.blocks[0].numel()].tolist())
        return value

    def settle(self) -> None:
        while self.tiers.busy:
            self.tiers.wait(1)
            self.tiers.settle()
            self.tiers.check_integrity()


def test_what_is_evicted_for_a_load_is_read_before_it_arrives(layout: ArenaLayout) -> None:
    memory = Memory(layout, 4)
    tiers = memory.tiers
    tiers.keep(0, 2, KEYS[2], passed=False)
    memory.settle()
    tiers.keep(0, 5, KEYS[5], passed=False)
    tiers.load(tiers.claim([(0, KEYS[2])]), [5])
    assert tiers.is_loading(0, 5)
    memory.mover.deliver_load()
    assert memory.blocks[5].unique().tolist() == [3]
    assert memory.held(KEYS[5]) == 6
    assert tiers.settle() == [(0, 5)]
    tiers.check_integrity()


def test_nothing_is_copied_twice(layout: ArenaLayout) -> None:
    memory = Memory(layout, 4)
    for _ in range(3):
        memory.tiers.keep(0, 2, KEYS[2], passed=False)
        memory.settle()
    assert memory.tiers.figures.num_bytes["to_host"] == layout.block_bytes(0)
    assert memory.held(KEYS[2]) == 3


def test_a_host_that_is_all_busy_drops_what_comes(layout: ArenaLayout) -> None:
    memory = Memory(layout, 2)
    for index in range(3):
        memory.tiers.keep(0, index, KEYS[index], passed=False)
    assert memory.tiers.figures.losses == {"host_busy": 1}
    memory.settle()
    with pytest.raises(ValueError, match="gone"):
        memory.tiers.claim([(0, KEYS[0]), (0, KEYS[2])])
    memory.tiers.check_integrity()


def test_what_is_claimed_is_not_pushed_out(layout: ArenaLayout) -> None:
    memory = Memory(layout, 2)
    memory.tiers.keep(0, 0, KEYS[0], passed=False)
    memory.settle()
    slots = memory.tiers.claim([(0, KEYS[0])])
    for index in range(1, 4):
        memory.tiers.keep(0, index, KEYS[index], passed=False)
        memory.tiers.flush()
        memory.mover.deliver_store()
        memory.tiers.settle()
    assert memory.held(KEYS[0]) == 1
    memory.tiers.disclaim(slots)
    memory.settle()


def test_figures_say_how_long_a_load_takes(layout: ArenaLayout) -> None:
    memory = Memory(layout, 4)
    tiers, size = memory.tiers, layout.block_bytes(0)
    assert tiers.load_seconds(size) == 0.0
    tiers.keep(0, 0, KEYS[0], passed=False)
    memory.settle()
    assert tiers.load_seconds(3 * size) == 3.0, "the way out says something of the way back"
    tiers.load(tiers.claim([(0, KEYS[0])]), [1])
    assert tiers.load_seconds(size) == 2.0, "what is on its way comes first"
    memory.settle()
    assert tiers.load_seconds(size) == 1.0


def test_blocks_come_back_from_disk(layout: ArenaLayout, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 20, block_shapes(layout))
    memory = Memory(layout, 4, disk)
    for index in range(8):
        memory.tiers.keep(0, index, KEYS[index], passed=False)
        memory.settle()
    assert [memory.tiers.host.has(0, key) for key in KEYS[:8]] == [False] * 4 + [True] * 4
    assert all(memory.tiers.is_stored(0, key) for key in KEYS[:8])
    first = memory.tiers.fetch([(0, key) for key in KEYS[:2]])
    second = memory.tiers.fetch([(0, key) for key in KEYS[1:3]])
    assert (first.num_pending, second.num_pending, memory.tiers.num_reading) == (2, 2, 3)
    memory.settle()
    assert (first.num_pending, second.num_pending) == (0, 0)
    assert [memory.held(KEYS[index]) for index in range(3)] == [1, 2, 3]
    assert memory.tiers.read_seconds(100) > 0
    memory.tiers.close()


def test_a_block_that_is_not_written_in_time_is_lost(
    layout: ArenaLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskTier(tmp_path, 1 << 20, block_shapes(layout))
    monkeypatch.setattr(disk, "is_free", lambda: False)
    memory = Memory(layout, 2, disk)
    for index in range(4):
        memory.tiers.keep(0, index, KEYS[index], passed=False)
        memory.settle()
    assert memory.tiers.figures.losses == {"disk_busy": 2}
    monkeypatch.undo()
    memory.tiers.settle()
    memory.settle()
    assert [memory.tiers.is_stored(0, key) for key in KEYS[:4]] == [False, False, True, True]
    assert disk.has(0, KEYS[2])
    memory.tiers.close()


def test_forgetting_leaves_nothing(layout: ArenaLayout, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 20, block_shapes(layout))
    memory = Memory(layout, 2, disk)
    for index in range(4):
        memory.tiers.keep(0, index, KEYS[index], passed=False)
        memory.settle()
    memory.tiers.forget()
    assert not any(memory.tiers.is_stored(0, key) for key in KEYS)
    memory.tiers.check_integrity()
    memory.tiers.close()
    assert not list(tmp_path.rglob("*.kv"))


def test_threads_do_the_same(layout: ArenaLayout) -> None:
    arena = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    host = torch.zeros(4 * layout.block_bytes(0), dtype=torch.uint8)
    tiers = BlockTiers(layout, host, ThreadMover(arena, layout, host))
    blocks = layout.view_group(arena, 0)
    blocks[3].fill_(7)
    tiers.keep(0, 3, KEYS[0], passed=False)
    tiers.fence()
    blocks[3].fill_(8)
    tiers.load(tiers.claim([(0, KEYS[0])]), [4])
    while tiers.busy:
        tiers.wait(10)
        tiers.settle()
    assert blocks[4].unique().tolist() == [7]
    assert tiers.figures.seconds.keys() == {"to_host", "from_host"}
    tiers.close()
