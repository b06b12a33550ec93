"""A mover that copies as late as it may, and only when it is told to: every order can be tried."""

from collections import deque
from collections.abc import Sequence

import torch

from headlong.cache.transfers import Move, Mover, Transfer
from headlong.kernels.layout import ArenaLayout


class LazyMover(Mover):
    def __init__(self, arena: torch.Tensor, layout: ArenaLayout, host: torch.Tensor) -> None:
        super().__init__(arena, layout, host)
        self._stores: deque[tuple[Move, ...]] = deque()
        # With the number of stores that were asked for before.
        self._loads: deque[tuple[int, tuple[Move, ...]]] = deque()
        self._num_asked = 0
        self._num_stored = 0
        self._done: list[Transfer] = []

    def store(self, moves: Sequence[Move]) -> None:
        self._stores.append(tuple(moves))
        self._num_asked += 1

    def load(self, moves: Sequence[Move]) -> None:
        self._loads.append((self._num_asked, tuple(moves)))

    def fence(self) -> None:
        while self._stores:
            self.deliver_store()

    def deliver_store(self) -> None:
        if self._stores:
            self._num_stored += 1
            self._copy(self._stores.popleft(), to_host=True)

    def deliver_load(self) -> None:
        if self._loads:
            num_before, moves = self._loads.popleft()
            while self._num_stored < num_before:
                self.deliver_store()
            self._copy(moves, to_host=False)

    def _copy(self, moves: tuple[Move, ...], *, to_host: bool) -> None:
        for move in moves:
            block, slot = self._pair(move)
            if to_host:
                slot.copy_(block)
            else:
                block.copy_(slot)
        self._done.append(Transfer(to_host, moves, self._size(moves), 1.0))

    def finished(self) -> list[Transfer]:
        done, self._done = self._done, []
        return done

    def wait(self, timeout_s: float) -> None:
        if self._loads:
            self.deliver_load()
        else:
            self.deliver_store()

    def close(self) -> None:
        self._stores.clear()
        self._loads.clear()
