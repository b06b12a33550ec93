"""Blocks beyond the arena: in the host's memory, and behind that in files.

kept in the arena       to host, when it is evicted or before; then it is found under its key there
held by the host        to arena, when a sequence begins with it; to a file, when one can be written
in a file               to host, while the sequence that wants it waits

Nothing here waits. What is on its way has its slot pinned; `settle` takes note of what arrived.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from headlong.cache.disk_tier import DiskTier, Name
from headlong.cache.host_tier import HostTier, Slot
from headlong.cache.moving_rate import MovingRate
from headlong.cache.tier_figures import TierFigures, Way
from headlong.cache.transfers import Move, Mover
from headlong.kernels.layout import ArenaLayout

WRITING_SHARE = 4
"""What is being written holds at most one in so many bytes of the host's memory, or one block."""


@dataclass(eq=False, slots=True)
class Fetch:
    """Blocks that are read from disk together.

    Attributes:
        began: When, in seconds of `time.perf_counter`.
        num_pending: Blocks that are still being read.
        num_bytes: Bytes of those that were read.
    """

    began: float
    num_pending: int = 0
    num_bytes: int = 0


class BlockTiers:
    """Keeps what the arena has no room for.

    Args:
        layout: The arena's map.
        buffer: uint8 [num_bytes], the host's memory for blocks.
        mover: Copies between the arena and the buffer.
        disk: Takes what the host holds; None is none.

    Attributes:
        host: What the buffer holds.
        disk: What the files hold, or None.
        figures: What was copied and lost.
        load_rate: Bytes a second from the host to the arena.
        read_rate: Bytes a second from disk to the host.

    Raises:
        ValueError: The buffer does not hold a block of every group at once.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        buffer: torch.Tensor,
        mover: Mover,
        disk: DiskTier | None = None,
    ) -> None:
        sizes = [layout.block_bytes(group) for group in range(layout.num_groups)]
        self.host = HostTier(buffer.numel(), sizes, self._forget_slot)
        self.disk = disk
        self.figures = TierFigures()
        self.load_rate = MovingRate()
        self.read_rate = MovingRate()
        self._store_rate = MovingRate()
        self._memory = buffer.numpy().data
        self._mover = mover
        self._to_store: list[Move] = []
        self._unfenced = False
        # By the offset, which no other slot in flight has.
        self._storing: dict[int, Slot] = {}
        self._loading: dict[tuple[int, int], Slot] = {}
        self._loading_bytes = 0
        # Held by the host alone, and not queued to be written.
        self._unwritten: OrderedDict[Slot, None] = OrderedDict()
        self._writing: dict[Name, Slot] = {}
        self._reading: dict[Name, tuple[Slot, list[Fetch]]] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(
            self._to_store
            or self._storing
            or self._loading
            or (self.disk is not None and self.disk.busy)
        )

    @property
    def num_loading(self) -> int:
        """Blocks on their way to the arena."""
        return len(self._loading)

    @property
    def num_reading(self) -> int:
        """Blocks on their way from disk."""
        return len(self._reading)

    def is_stored(self, group: int, key: bytes) -> bool:
        """Whether the host or a file has a block."""
        on_disk = self.disk is not None and self.disk.has(group, key)
        return self.host.has(group, key) or on_disk

    def is_loading(self, group: int, block: int) -> bool:
        """Whether a block of the arena waits for its contents."""
        return (group, block) in self._loading

    def loading(self, group: int) -> Iterable[int]:
        """Blocks of a group that wait for their contents."""
        return [block for each, block in self._loading if each == group]

    def load_seconds(self, num_bytes: int) -> float:
        """How long it will take to load so much more, by what was measured; 0 if nothing was."""
        rate = self.load_rate.per_second or self._store_rate.per_second
        return 0.0 if rate is None else (self._loading_bytes + num_bytes) / rate

    def read_seconds(self, num_bytes: int) -> float:
        """How long it will take to read so much from disk; 0 if nothing was measured."""
        rate = self.read_rate.per_second
        return 0.0 if rate is None else num_bytes / rate

    def keep(self, group: int, block: int, key: bytes, passed: bool) -> None:
        """Copy a block to the host, if it is not there, before it is overwritten.

        Args:
            group: Index of the head group.
            block: In the arena; not to be written before `fence`.
            key: Its key.
            passed: Whether a window has left it, and nobody found it since.
        """
        held = self.host.find(group, key)
        if held is not None:
            self.host.touch(held)
            return
        slot = self.host.reserve(group)
        if slot is None:
            self.figures.lose("host_busy")
            return
        self.host.fill(slot, key, passed=passed)
        self._storing[slot.offset] = slot
        self._to_store.append(Move(group, block, slot.offset))

    def keep_ahead(self, group: int, block: int, key: bytes, passed: bool) -> bool:
        """The same for a block that is not evicted yet, if nothing has to make room for it."""
        if self.host.has(group, key) or not self.host.is_roomy(group, passed=passed):
            return False
        self.keep(group, block, key, passed)
        return True

    def flush(self) -> None:
        """Begin the copies to the host."""
        if self._to_store:
            self._mover.store(self._to_store)
            self._to_store = []
            self._unfenced = True

    def fence(self) -> None:
        """Let steps write over what was kept."""
        self.flush()
        if self._unfenced:
            self._mover.fence()
            self._unfenced = False

    def claim(self, names: Iterable[Name]) -> list[Slot]:
        """Keep the host from forgetting blocks that are about to be loaded.

        Raises:
            ValueError: One is not held; none was claimed.
        """
        slots = [self.host.find(*name) for name in names]
        if None in slots:
            raise ValueError("a block of the match is gone")
        found = [slot for slot in slots if slot is not None]
        for slot in found:
            self.host.pin(slot)
            self.host.keep(slot)
        return found

    def disclaim(self, slots: Iterable[Slot]) -> None:
        """Give up what was claimed."""
        for slot in slots:
            self.host.unpin(slot)

    def load(self, slots: Sequence[Slot], blocks: Sequence[int]) -> None:
        """Begin to copy claimed blocks to the arena.

        Args:
            slots: What was claimed.
            blocks: For each of them a block of its group; nobody may use it until it is settled.
        """
        self.flush()
        for slot, block in zip(slots, blocks, strict=True):
            self._loading[slot.group, block] = slot
            self._loading_bytes += self.host.block_bytes[slot.group]
        moves = [
            Move(slot.group, block, slot.offset) for slot, block in zip(slots, blocks, strict=True)
        ]
        if moves:
            self._mover.load(moves)

    def fetch(self, names: Iterable[Name]) -> Fetch:
        """Begin to read blocks from disk that the host does not hold, as far as there is room.

        Args:
            names: Of blocks that the disk is said to have.
        """
        fetch = Fetch(time.perf_counter())
        assert self.disk is not None
        for group, key in names:
            if self.host.has(group, key):
                continue
            if (group, key) not in self._reading:
                slot = self.host.reserve(group)
                if slot is None:
                    break
                self._reading[group, key] = slot, []
                self.disk.read(group, key, self._view(slot))
            self._reading[group, key][1].append(fetch)
            fetch.num_pending += 1
        return fetch

    def settle(self) -> list[tuple[int, int]]:
        """Take note of what arrived.

        Returns:
            Groups and blocks of the arena that have their contents now.
        """
        arrived: list[tuple[int, int]] = []
        for transfer in self._mover.finished():
            way: Way = "to_host" if transfer.to_host else "from_host"
            self.figures.note(way, transfer.num_bytes, transfer.seconds)
            rate = self._store_rate if transfer.to_host else self.load_rate
            rate.add(transfer.num_bytes, transfer.seconds)
            for move in transfer.moves:
                if transfer.to_host:
                    self._arrived(self._storing.pop(move.offset))
                else:
                    self.host.unpin(self._loading.pop((move.group, move.block)))
                    arrived.append((move.group, move.block))
            if not transfer.to_host:
                self._loading_bytes -= transfer.num_bytes
        if self.disk is not None:
            self._settle_disk(self.disk)
        return arrived

    def wait(self, timeout_s: float) -> None:
        """Return when something has arrived, or nothing is on its way, or the time is over."""
        self.flush()
        if self._storing or self._loading:
            self._mover.wait(timeout_s)
        elif self.disk is not None:
            self.disk.wait(timeout_s)

    def drop_writes(self) -> None:
        """Write nothing but what is queued, until more reaches the host."""
        self._unwritten.clear()

    def forget(self) -> None:
        """Forget every block, those on disk too; nothing may be on its way."""
        self.drop_writes()
        self.host.clear()
        if self.disk is not None:
            self.disk.forget()

    def close(self) -> None:
        """End what is being copied or written and drop the rest; the last call."""
        self._mover.close()
        if self.disk is not None:
            self.disk.close()

    def _arrived(self, slot: Slot) -> None:
        """A block reached the host."""
        self.host.unpin(slot)
        if self.disk is None or slot.key is None:
            return
        if not self.disk.has(slot.group, slot.key):
            self._unwritten[slot] = None

    def _settle_disk(self, disk: DiskTier) -> None:
        written, reads = disk.collect()
        for each in written:
            slot = self._writing.pop(each.name)
            self.host.unpin(slot)
            if each.error is None:
                self.figures.note("to_disk", self.host.block_bytes[slot.group], each.seconds)
            else:
                self.figures.lose("unwritten")
        for read in reads:
            slot, fetches = self._reading.pop(read.name)
            num_bytes = 0
            if read.problem is not None:
                self.figures.lose("unreadable")
            else:
                num_bytes = self.host.block_bytes[slot.group]
                self.figures.note("from_disk", num_bytes, read.seconds)
                # It may have been computed again meanwhile, and evicted.
                if not self.host.has(*read.name):
                    self.host.fill(slot, read.name[1])
            self.host.unpin(slot)
            for fetch in fetches:
                self._note_read(fetch, num_bytes)
        while self._unwritten and disk.is_free() and self._may_write:
            slot, _ = self._unwritten.popitem(last=False)
            assert slot.key is not None
            self.host.pin(slot)
            self._writing[slot.group, slot.key] = slot
            disk.write(slot.group, slot.key, self._view(slot))

    @property
    def _may_write(self) -> bool:
        """Whether what is being written leaves room in the host for what is evicted meanwhile."""
        sizes = self.host.block_bytes
        pinned = sum(sizes[group] for group, _ in self._writing)
        return pinned * WRITING_SHARE < self.host.num_bytes

    def _note_read(self, fetch: Fetch, num_bytes: int) -> None:
        fetch.num_pending -= 1
        fetch.num_bytes += num_bytes
        if fetch.num_pending == 0 and fetch.num_bytes:
            self.read_rate.add(fetch.num_bytes, time.perf_counter() - fetch.began)

    def _forget_slot(self, slot: Slot) -> None:
        """The host is about to forget a block."""
        if slot in self._unwritten:
            del self._unwritten[slot]
            self.figures.lose("disk_busy")

    def _view(self, slot: Slot) -> memoryview:
        return self._memory[slot.offset : slot.offset + self.host.block_bytes[slot.group]]

    def check_integrity(self) -> None:
        """Prove that every slot has one place, and is pinned by what is on its way alone.

        Raises:
            AssertionError: A slot leaked.
        """
        in_flight = (
            len(self._storing) + len(self._loading) + len(self._writing) + len(self._reading)
        )
        self.host.check_integrity(in_flight)
        assert len(self._to_store) <= len(self._storing)
        for slot in self._unwritten:
            assert slot.key is not None and self.host.find(slot.group, slot.key) is slot
