import hashlib
import hmac

import pytest

from headlong.server.api_keys import ApiKeys, read_api_keys
from headlong.server.config import ServerConfig
from headlong.server.errors import ConfigError


def read(tmp_path, text, *, name="keys.txt", **given):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_api_keys(ServerConfig(api_key_file=file, **given))


def test_no_keys():
    keys = read_api_keys(ServerConfig())
    assert not keys
    assert keys.name_of(b"") is None


def test_keys_are_numbered():
    keys = read_api_keys(ServerConfig(api_key=("one", "two")))
    assert len(keys) == 2
    assert (keys.name_of(b"one"), keys.name_of(b"two")) == ("key-1", "key-2")
    for other in (b"", b"on", b"onee", b"One", b"\xff", b"key-1"):
        assert keys.name_of(other) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("# who\n\nalice: hush-1\r\n  bob:a:b=c\n", "keys.txt"),
        ("alice: hush-1\nbob: 'a:b=c'\n", "keys.yaml"),
        ('{"alice": "hush-1", "bob": "a:b=c"}', "keys.yml"),
    ],
)
def test_a_file_gives_names(tmp_path, text, name):
    keys = read(tmp_path, text, name=name, api_key=("direct",))
    assert len(keys) == 3
    assert keys.name_of(b"hush-1") == "alice"
    assert keys.name_of(b"a:b=c") == "bob"
    assert keys.name_of(b"direct") == "key-1"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("hush-1\n", "keys.txt", ":1: must be NAME:KEY"),
        ("alice:\n", "keys.txt", ":1: the key of 'alice' is empty"),
        ("\nalice:hush-1\nalice:hush-2\n", "keys.txt", ":3: the name 'alice' was given before"),
        ("alice:hush-1\nbob:hush-1\n", "keys.txt", ":2: the key of 'bob' was given before"),
        ("key-1:hush-1\n", "keys.txt", ":1: the name 'key-1' was given before"),
        ("bob:direct\n", "keys.txt", ":1: the key of 'bob' was given before"),
        (":hush-1\n", "keys.txt", ":1: the name of a key"),
        ("al ice:hush-1\n", "keys.txt", ":1: the name of a key"),
        (f"{'a' * 65}:hush-1\n", "keys.txt", ":1: the name of a key"),
        ("alice:hüsh-1\n", "keys.txt", ":1: the key of 'alice' may only hold"),
        ("alice:hush 1\n", "keys.txt", ":1: the key of 'alice' may only hold"),
        ("# hush-1\n", "keys.txt", "holds no key"),
        ("", "keys.yaml", "holds no key"),
        (b"alice:\xff\n", "keys.txt", "not UTF-8"),
        ("alice: 12345\n", "keys.yaml", ":1: names and keys must be text"),
        ("1: hush-1\n", "keys.yaml", ":1: names and keys must be text"),
        ("alice: [hush-1]\n", "keys.yaml", ":1: names and keys must be text"),
        ("alice: hush-1\nalice: hush-2\n", "keys.yaml", ":2: the name 'alice' was given before"),
        ("- hush-1\n", "keys.yaml", "must be a mapping"),
        ("alice: hush-1: hush-2\n", "keys.yaml", "not valid YAML"),
    ],
)
def test_a_bad_file_is_told_without_keys(tmp_path, text, name, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, name=name, api_key=("direct",))
    assert message in str(caught.value)
    assert name in str(caught.value)
    for secret in ("hush", "direct", "12345"):
        assert secret not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("none.txt", "none.yaml"):
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            read_api_keys(ServerConfig(api_key_file=tmp_path / name))


def test_all_digests_are_compared_whatever_the_key(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = ApiKeys({"a": "first", "b": "second", "c": "third"})
    known = [hashlib.sha256(key).digest() for key in (b"first", b"second", b"third")]
    for key, name in ((b"first", "a"), (b"third", "c"), (b"none", None)):
        compared.clear()
        assert keys.name_of(key) == name
        assert compared == [(hashlib.sha256(key).digest(), each) for each in known]


def test_keys_are_not_kept():
    assert "hush" not in repr(vars(ApiKeys({"a": "hush"})))
