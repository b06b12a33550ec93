import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headlong.cache.block_files import (
    HEADER_BYTES,
    STALE_S,
    BlockShape,
    block_shapes,
    file_path,
    read_block,
    scan_blocks,
    write_block,
)
from headlong.cache.disk_tier import DiskTier, Read
from headlong.kernels.layout import PageLayout, build_arena_layout

SHAPES = (BlockShape(0, b"a" * 16, 100), BlockShape(1, b"b" * 16, 60))
FILE_BYTES = HEADER_BYTES + 100
KEYS = [bytes([index]) * 32 for index in range(20)]


def payload(index: int, size: int = 100) -> memoryview:
    return memoryview(bytes([index + 1]) * size)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path, 10 * FILE_BYTES, SHAPES)
    yield tier
    tier.close()


def quiet(tier: DiskTier) -> list[Read]:
    reads: list[Read] = []
    while tier.busy:
        tier.wait(10)
        reads += tier.collect()[1]
    # What is removed is removed on the thread that writes.
    tier._writer.submit(int).result()
    return reads


def fill(tier: DiskTier, indices: range) -> None:
    for index in indices:
        tier.write(0, KEYS[index], payload(index))
    quiet(tier)


def read(tier: DiskTier, index: int) -> bytes | None:
    into = bytearray(100)
    tier.read(0, KEYS[index], memoryview(into))
    (found,) = quiet(tier)
    return bytes(into) if found.problem is None else None


def test_blocks_come_back(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(3))
    assert [read(tier, index) for index in range(3)] == [bytes(payload(i)) for i in range(3)]
    assert tier.held_bytes == 3 * FILE_BYTES
    assert file_path(tmp_path, 0, KEYS[0]).stat().st_mode & 0o777 == 0o600
    assert file_path(tmp_path, 0, KEYS[0]).parent.stat().st_mode & 0o777 == 0o700


def test_another_server_finds_them_in_their_order(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(4))
    for index in range(4):
        os.utime(file_path(tmp_path, 0, KEYS[index]), (1000 + index, 1000 + index))
    assert read(tier, 0) is not None
    later = DiskTier(tmp_path, 2 * FILE_BYTES, SHAPES)
    later._writer.submit(int).result()
    assert [later.has(0, key) for key in KEYS[:4]] == [True, False, False, True]
    assert sorted(path.name[:2] for path in tmp_path.rglob("*.kv")) == ["00", "03"]
    later.close()
    # The first server did not know.
    assert tier.has(0, KEYS[1])
    assert read(tier, 1) is None
    assert not tier.has(0, KEYS[1])
    assert tier.num_unreadable == 1


def test_the_oldest_are_removed(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(10))
    read(tier, 0)
    fill(tier, range(10, 13))
    assert [index for index in range(13) if tier.has(0, KEYS[index])] == [0, *range(4, 13)]
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.kv")]
    assert sum(sizes) == tier.held_bytes == 10 * FILE_BYTES


@pytest.mark.parametrize("at", [0, 8, 12, 16, 40, 66, 72, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_no_byte_may_change(tier: DiskTier, tmp_path: Path, at: int) -> None:
    fill(tier, range(1))
    path = file_path(tmp_path, 0, KEYS[0])
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    assert read(tier, 0) is None
    assert not path.exists()
    assert not tier.has(0, KEYS[0])
    assert tier.held_bytes == 0


@pytest.mark.parametrize("length", [0, 5, HEADER_BYTES, FILE_BYTES - 1, FILE_BYTES + 1])
def test_the_length_must_be_right(tier: DiskTier, tmp_path: Path, length: int) -> None:
    fill(tier, range(1))
    path = file_path(tmp_path, 0, KEYS[0])
    path.write_bytes((path.read_bytes() + b"\0")[:length])
    assert read(tier, 0) is None


def test_a_file_is_one_blocks_alone(tmp_path: Path) -> None:
    into = memoryview(bytearray(100))
    write_block(tmp_path, SHAPES[0], KEYS[0], payload(0))
    assert read_block(tmp_path, SHAPES[0], KEYS[0], into) is None
    # Another key, another group, and other blocks of the same size.
    for shape, key in (
        (SHAPES[0], KEYS[1]),
        (BlockShape(1, b"a" * 16, 100), KEYS[0]),
        (BlockShape(0, b"c" * 16, 100), KEYS[0]),
    ):
        target = file_path(tmp_path, shape.group, key)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file_path(tmp_path, 0, KEYS[0]).read_bytes())
        assert "another" in str(read_block(tmp_path, shape, key, into))


def test_shapes_tell_pages_apart() -> None:
    def shapes(page: PageLayout, heads: int) -> tuple[BlockShape, ...]:
        members = (tuple((0, head) for head in range(heads)),)
        return block_shapes(build_arena_layout(members, (page,), (4,)))

    float32 = shapes(PageLayout(8, 4, torch.float32), 2)
    # As many bytes, cut otherwise.
    others = [
        shapes(PageLayout(16, 4, torch.bfloat16), 2),
        shapes(PageLayout(8, 2, torch.float32), 4),
    ]
    assert {each[0].num_bytes for each in (float32, *others)} == {float32[0].num_bytes}
    assert len({each[0].geometry for each in (float32, *others)}) == 3


def test_what_nobody_finished_goes_when_it_is_old(tmp_path: Path) -> None:
    write_block(tmp_path, SHAPES[0], KEYS[0], payload(0))
    folder = file_path(tmp_path, 0, KEYS[0]).parent
    new, old = (f"{KEYS[1].hex()}-0.kv.{mark * 16}.tmp" for mark in "ab")
    others = ("another's.tmp", KEYS[2].hex() + ".tmp", KEYS[3].hex())
    now = time.time()
    for name in (new, old, *others):
        (folder / name).touch()
        if name != new:
            os.utime(folder / name, (now - STALE_S - 1, now - STALE_S - 1))
    (tmp_path / "README").touch()
    assert [each.key for each in scan_blocks(tmp_path, now)] == [KEYS[0]]
    assert not (folder / old).exists()
    assert all((folder / name).exists() for name in (new, *others))


def test_what_is_no_file_is_a_miss(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(3))
    paths = [file_path(tmp_path, 0, key) for key in KEYS[:3]]
    kept = tmp_path / "kept"
    paths[0].rename(kept)
    paths[0].symlink_to(kept)
    paths[1].unlink()
    # Whoever opens it plainly waits for another to write.
    os.mkfifo(paths[1])
    # With another who could write it is empty, and has no end.
    other = os.open(paths[1], os.O_RDWR)
    paths[2].unlink()
    paths[2].mkdir()
    assert not list(scan_blocks(tmp_path, time.time()))
    assert [read(tier, index) for index in range(3)] == [None] * 3
    os.close(other)
    assert kept.exists()
    assert not any(tier.has(0, key) for key in KEYS)


def test_a_disk_that_fails_is_said_once(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headlong.cache.block_files._write_all", full)
    fill(tier, range(5))
    assert tier.num_unwritten == 5
    assert not any(tier.has(0, key) for key in KEYS)
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_files_that_cannot_be_removed_are_said_once(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*args: object, **named: object) -> None:
        raise OSError(30, "Read-only file system")

    fill(tier, range(10))
    monkeypatch.setattr(Path, "unlink", read_only)
    fill(tier, range(10, 13))
    monkeypatch.undo()
    assert [index for index in range(13) if tier.has(0, KEYS[index])] == [*range(3, 13)]
    assert [record.message.count("Read-only") for record in caplog.records] == [1]


def test_a_folder_that_vanishes_is_a_miss(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(3))
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert read(tier, 0) is None
    fill(tier, range(5, 7))
    assert (tier.num_unreadable, tier.num_unwritten) == (1, 2)
    assert tier.held_bytes == 2 * FILE_BYTES
    tmp_path.with_name("elsewhere").rename(tmp_path)
    assert read(tier, 1) == bytes(payload(1))


def test_forgetting_leaves_no_file(tier: DiskTier, tmp_path: Path) -> None:
    fill(tier, range(3))
    tier.forget()
    tier._writer.submit(int).result()
    assert not list(tmp_path.rglob("*.kv"))
    assert tier.held_bytes == 0


def test_the_queue_is_bounded(tier: DiskTier) -> None:
    count = 0
    while tier.is_free():
        # Nothing is taken note of before `collect`.
        tier.write(0, bytes([count]) * 32, payload(count))
        count += 1
    assert count == 64
    quiet(tier)
    assert tier.is_free()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        DiskTier(tmp_path / "file", 1000, SHAPES)


def test_two_servers_share_a_folder(tier: DiskTier, tmp_path: Path) -> None:
    """Each writes, reads and removes as it likes: what is read is right, or a miss."""
    other = DiskTier(tmp_path, 5 * FILE_BYTES, SHAPES)
    into = [bytearray(100) for _ in range(40)]
    for turn in range(40):
        index = turn % 13
        for each in (tier, other):
            if not each.has(0, KEYS[index]):
                each.write(0, KEYS[index], payload(index))
        reader = (tier, other)[turn % 2]
        reader.read(0, KEYS[index], memoryview(into[turn]))
        problems = {read.problem for read in quiet(reader)}
        if problems == {None}:
            assert bytes(into[turn]) == bytes(payload(index))
        quiet(tier)
        quiet(other)
    assert other.held_bytes <= 5 * FILE_BYTES
    assert not list(tmp_path.rglob("*.tmp"))
    other.close()
