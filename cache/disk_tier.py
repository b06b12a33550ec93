"""Blocks in a folder, found again after a restart; what is wrong there is a miss.

The index is the caller's thread's alone. One thread writes and removes, some read; what they did is
taken note of in `collect`. Two servers may share a folder: a file that the other removed is a miss,
and each bounds the bytes of the files that it knows of.
"""

import logging
import os
import time
from collections import OrderedDict, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from headlong.cache.block_files import (
    BlockShape,
    file_path,
    read_block,
    scan_blocks,
    write_block,
)

logger = logging.getLogger(__name__)

MAX_QUEUED = 64
"""Blocks that may wait for the writing thread, or for the disk."""

READERS = 4
"""Threads that read: most of the time of one goes into the checksum."""

Name = tuple[int, bytes]
"""A group's index, and a block's key."""


@dataclass(frozen=True, slots=True)
class Written:
    """A block was written, or could not be.

    Attributes:
        name: Which.
        seconds: What it took.
        error: What went wrong, or None.
    """

    name: Name
    seconds: float
    error: OSError | None


@dataclass(frozen=True, slots=True)
class Read:
    """A block was read, or is not to be had.

    Attributes:
        name: Which.
        seconds: What it took.
        problem: What is wrong with it, or None.
    """

    name: Name
    seconds: float
    problem: str | None


def prepare_folder(folder: Path) -> None:
    """Make a folder for files, if it is not there, and see whether it can be written.

    Raises:
        OSError: It cannot be made or written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


class DiskTier:
    """Files of blocks, least recently used ones removed first.

    Args:
        folder: Where; made if it is not there.
        num_bytes: Most bytes of all files.
        shapes: Of each group's blocks.

    Attributes:
        held_bytes: Bytes of all files that can be found.
        num_unreadable: Files that were no blocks of ours, or no longer.
        num_unwritten: Blocks that could not be written.

    Raises:
        OSError: The folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, num_bytes: int, shapes: tuple[BlockShape, ...]) -> None:
        prepare_folder(folder)
        self._folder = folder
        self._num_bytes = num_bytes
        self._shapes = shapes
        self.held_bytes = 0
        self._queued_bytes = 0
        self.num_unreadable = 0
        self.num_unwritten = 0
        self._warned: set[str] = set()
        self._sizes: OrderedDict[Name, int] = OrderedDict()
        self._writing: dict[Name, Future[Written]] = {}
        self._reads: deque[Future[Read]] = deque()
        self._writer = ThreadPoolExecutor(1, "kv-write")
        self._readers = ThreadPoolExecutor(READERS, "kv-read")
        found = sorted(scan_blocks(folder, time.time()), key=lambda each: each.modified)
        for each in found:
            self._add((each.group, each.key), each.num_bytes)
        self._bound()

    def has(self, group: int, key: bytes) -> bool:
        """Whether a group's block is said to be there, or on its way there."""
        return (group, key) in self._sizes or (group, key) in self._writing

    def is_free(self) -> bool:
        """Whether one more block may be queued to be written."""
        return len(self._writing) < MAX_QUEUED

    @property
    def busy(self) -> bool:
        """Whether something is being written or read."""
        return bool(self._writing or self._reads)

    def write(self, group: int, key: bytes, payload: memoryview) -> None:
        """Queue a block to be written.

        Args:
            group: Index of the head group.
            key: The block's.
            payload: Its bytes, which must not change until it is written.
        """
        name = group, key
        self._queued_bytes += self._shapes[group].file_bytes
        self._bound()
        self._writing[name] = self._writer.submit(self._write, name, payload)

    def read(self, group: int, key: bytes, into: memoryview) -> None:
        """Queue a block to be read.

        Args:
            group: Index of the head group.
            key: The block's.
            into: Where its bytes go.
        """
        self._reads.append(self._readers.submit(self._read, (group, key), into))

    def collect(self) -> tuple[list[Written], list[Read]]:
        """Hand out what was written and read since the last call."""
        done = takewhile(Future.done, self._writing.values())
        written = [future.result() for future in done]
        for each in written:
            self._note_written(each)
        reads: list[Read] = []
        pending: list[Future[Read]] = []
        # They begin in order: behind as many that are not done as there are threads, none is.
        while self._reads and len(pending) < READERS:
            future = self._reads.popleft()
            if future.done():
                reads.append(future.result())
            else:
                pending.append(future)
        self._reads.extendleft(reversed(pending))
        for read in reads:
            self._note_read(read)
        return written, reads

    def wait(self, timeout_s: float) -> None:
        """Return when something was written or read, or nothing is queued, or the time is over."""
        # What began first is done first, or some of what began with it.
        pending: list[Future[Any]] = [
            *islice(self._writing.values(), 1),
            *islice(self._reads, READERS),
        ]
        if pending:
            wait(pending, timeout_s, FIRST_COMPLETED)

    def forget(self) -> None:
        """Remove every file that can be found; nothing may be queued."""
        while self._sizes:
            self._remove(next(iter(self._sizes)))

    def close(self) -> None:
        """Finish what is to be written, which is bounded, and drop what is to be read."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)

    def _write(self, name: Name, payload: memoryview) -> Written:
        start = time.perf_counter()
        error: OSError | None = None
        try:
            write_block(self._folder, self._shapes[name[0]], name[1], payload)
        except OSError as caught:
            error = caught
        return Written(name, time.perf_counter() - start, error)

    def _read(self, name: Name, into: memoryview) -> Read:
        start = time.perf_counter()
        problem = read_block(self._folder, self._shapes[name[0]], name[1], into)
        path = file_path(self._folder, *name)
        try:
            if problem is None:
                # After a restart the order of use is that of the files' times.
                os.utime(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # another server removed it, or the folder may not be written any more
        return Read(name, time.perf_counter() - start, problem)

    def _note_written(self, written: Written) -> None:
        del self._writing[written.name]
        file_bytes = self._shapes[written.name[0]].file_bytes
        self._queued_bytes -= file_bytes
        if written.error is None:
            self._add(written.name, file_bytes)
            self._bound()
        else:
            self.num_unwritten += 1
            self._warn(f"a block could not be written: {written.error.strerror}")

    def _note_read(self, read: Read) -> None:
        if read.problem is None:
            if read.name in self._sizes:
                self._sizes.move_to_end(read.name)
            return
        self.num_unreadable += 1
        self.held_bytes -= self._sizes.pop(read.name, 0)
        self._warn(f"a block is computed again, its file is gone: {read.problem}")

    def _warn(self, text: str) -> None:
        """Log something once: a disk that is full, or read-only, says so for every block."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("disk cache %s: %s", self._folder, text)

    def _add(self, name: Name, num_bytes: int) -> None:
        self.held_bytes += num_bytes - self._sizes.pop(name, 0)
        self._sizes[name] = num_bytes

    def _bound(self) -> None:
        # The thread that writes removes first what was asked for first.
        while self._sizes and self.held_bytes + self._queued_bytes > self._num_bytes:
            self._remove(next(iter(self._sizes)))

    def _remove(self, name: Name) -> None:
        self.held_bytes -= self._sizes.pop(name)
        self._writer.submit(self._unlink, file_path(self._folder, *name))

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"a file cannot be removed: {error.strerror}")
