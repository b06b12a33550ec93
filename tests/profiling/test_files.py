import os
from pathlib import Path

import pytest

from headlong.profiling.errors import ProfileFileError
from headlong.profiling.files import read_json_object, read_text, write_bytes


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ProfileFileError, match=r"gone\.json: no such file"):
        read_text(tmp_path / "gone.json")
    with pytest.raises(ProfileFileError, match="is a folder, not a file"):
        read_text(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileFileError, match="is not UTF-8 text"):
        read_text(tmp_path / "bytes")
    with pytest.raises(ProfileFileError, match="cannot be read"):
        read_text(tmp_path / "bytes" / "inside")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("3", "holds a int, not a JSON object"),
        ('{"a": Infinity}', "holds Infinity"),
        ('{"a": {"b": 1, "b": 2}}', "says the key 'b' twice"),
    ],
)
def test_json_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ProfileFileError, match=message):
        read_json_object(tmp_path / "x.json")


def test_writing_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_writing_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileFileError, match="cannot be written: No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ProfileFileError, match="cannot be written: No such file or directory"):
        write_bytes(tmp_path / "missing" / "x", b"")
