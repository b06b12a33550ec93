"""Blocks as files: one file a block, which proves by itself that it is whole and whose it is.

    magic        8 bytes
    version      uint32
    group        uint32, index of the head group
    geometry     16 bytes, digest of how a block of the group is laid out
    key          32 bytes, of the block
    length       uint64, bytes of the payload
    checksum     32 bytes, BLAKE2b of all the above and the payload
    payload      the block's bytes

Integers are little-endian. The name is the key and the group, so that a folder's listing is its
index. A file is written beside its place and renamed, so that under its name it is always whole,
unless a disk or a person changed it.
"""

import hashlib
import os
import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from headlong.kernels.layout import ArenaLayout

MAGIC = b"HEADLONG"
FORMAT_VERSION = 1
KEY_BYTES = 32
CHECKSUM_BYTES = 32
STALE_S = 3600.0
"""A file that nobody finished to write for so long is nobody's."""

_HEADER = struct.Struct(f"<8sII16s{KEY_BYTES}sQ")
HEADER_BYTES = _HEADER.size + CHECKSUM_BYTES
_NAME = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})-([0-9]{{1,3}})\.kv")
_TEMPORARY = re.compile(rf"{_NAME.pattern}\.[0-9a-f]{{16}}\.tmp")
# Of a pipe that somebody put in place of a file the other end would be waited for.
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a file of a group must look like.

    Attributes:
        group: Index of the head group.
        geometry: Digest of how its blocks are laid out.
        num_bytes: Bytes of a block.
    """

    group: int
    geometry: bytes
    num_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of a file."""
        return HEADER_BYTES + self.num_bytes

    def header(self, key: bytes) -> bytes:
        """What stands before the checksum in the file of a block."""
        return _HEADER.pack(MAGIC, FORMAT_VERSION, self.group, self.geometry, key, self.num_bytes)


class StoredBlock(NamedTuple):
    """A file that was found by its name."""

    group: int
    key: bytes
    num_bytes: int
    modified: float


def block_shapes(layout: ArenaLayout) -> tuple[BlockShape, ...]:
    """What files of each group must look like."""
    shapes: list[BlockShape] = []
    for group, (page, count) in enumerate(zip(layout.pages, layout.group_pages, strict=True)):
        digest = hashlib.blake2b(repr((page, count)).encode(), digest_size=16).digest()
        shapes.append(BlockShape(group, digest, layout.block_bytes(group)))
    return tuple(shapes)


def file_path(folder: Path, group: int, key: bytes) -> Path:
    """Where a block's file is."""
    name = key.hex()
    return folder / name[:2] / f"{name}-{group}.kv"


def write_block(folder: Path, shape: BlockShape, key: bytes, payload: memoryview) -> None:
    """Write a block's file, in place of an older one.

    Args:
        folder: Of all files.
        shape: Of the block's group.
        key: The block's.
        payload: Its bytes; they must not change meanwhile.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    path = file_path(folder, shape.group, key)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Two servers may write the same block at the same time, each as process 1 of its container.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    header = shape.header(key)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(descriptor, header + _checksum(header, payload))
            _write_all(descriptor, payload)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def read_block(folder: Path, shape: BlockShape, key: bytes, into: memoryview) -> str | None:
    """Read a block's file.

    Args:
        folder: Of all files.
        shape: Of the block's group.
        key: The block's.
        into: Where its bytes go, as many as the shape has; undefined unless None is returned.

    Returns:
        What is wrong with the file; None if it is whole, and the block's.
    """
    path = file_path(folder, shape.group, key)
    expected = shape.header(key)
    try:
        descriptor = os.open(path, _READING)
        try:
            header = os.read(descriptor, HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                return "it is too short"
            if header[: _HEADER.size] != expected:
                return "its header is another block's or another version's"
            if not _read_all(descriptor, into):
                return "it is too short"
            if os.read(descriptor, 1):
                return "it is too long"
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or type(error).__name__
    if header[_HEADER.size :] != _checksum(expected, into):
        return "its checksum is wrong"
    return None


def _read_all(descriptor: int, into: memoryview) -> bool:
    left = into
    while left:
        count = os.readv(descriptor, [left])
        if count == 0:
            return False
        left = left[count:]
    return True


def _checksum(header: bytes, payload: memoryview) -> bytes:
    digest = hashlib.blake2b(header, digest_size=CHECKSUM_BYTES)
    digest.update(payload)
    return digest.digest()


def scan_blocks(folder: Path, now: float) -> Iterator[StoredBlock]:
    """Find the files of a folder by their names, and remove what nobody finished to write.

    Args:
        folder: Of all files.
        now: The time, in seconds of Unix.

    Raises:
        OSError: The folder cannot be read.
    """
    for shard in sorted(folder.iterdir()):
        if not re.fullmatch("[0-9a-f]{2}", shard.name) or not shard.is_dir():
            continue
        for path in shard.iterdir():
            try:
                status = path.lstat()
                if not S_ISREG(status.st_mode):
                    continue
                if _TEMPORARY.fullmatch(path.name):
                    if now - status.st_mtime > STALE_S:
                        path.unlink()
                    continue
            except OSError:
                continue  # another server removed it
            named = _NAME.fullmatch(path.name)
            if named is not None:
                key = bytes.fromhex(named[1])
                yield StoredBlock(int(named[2]), key, status.st_size, status.st_mtime)
