from hashlib import sha256
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.cache.prefix_keys import PrefixKeys

POLICIES = (RETRIEVAL, HeadPolicy(4, 16))


def build_keys(
    tokens: list[int],
    namespace: bytes = b"model",
    policies: tuple[HeadPolicy, ...] = POLICIES,
    salt: str = "",
    block_size: int = 4,
    dense_tokens: int | None = None,
) -> PrefixKeys:
    keys = PrefixKeys(namespace, policies, salt, block_size, dense_tokens)
    keys.extend(tokens)
    return keys


def test_a_key_is_the_hash_of_its_parent_and_its_tokens() -> None:
    keys = build_keys([1, 2, 3, 4, 5, 6, 7, 2**31, 9])
    assert len(keys.blocks) == 2
    assert keys.blocks[1] == sha256(keys.blocks[0] + pack("<4q", 5, 6, 7, 2**31)).digest()


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 30), max_size=5),
    st.integers(1, 5),
)
def test_keys_do_not_depend_on_how_a_sequence_grew(
    tokens: list[int], stops: list[int], block_size: int
) -> None:
    grown = PrefixKeys(b"", POLICIES, "", block_size)
    for stop in sorted(stops):
        grown.extend(tokens[:stop])
    grown.extend(tokens)
    assert grown.blocks == build_keys(tokens, b"", block_size=block_size).blocks
    assert len(grown.blocks) == len(tokens) // block_size


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_equal_keys_mean_equal_prefixes(one: list[int], other: list[int]) -> None:
    first, second = build_keys(one, block_size=2).blocks, build_keys(other, block_size=2).blocks
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        end = 2 * (index + 1)
        assert (a == b) == (one[:end] == other[:end])
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(
    "changed",
    [
        build_keys([1, 2, 3, 4], namespace=b"other"),
        build_keys([1, 2, 3, 4], policies=(RETRIEVAL, HeadPolicy(4, 17))),
        build_keys([1, 2, 3, 4], policies=(RETRIEVAL, HeadPolicy(5, 16))),
        build_keys([1, 2, 3, 4], policies=POLICIES[::-1]),
        build_keys([1, 2, 3, 4], policies=POLICIES[:1]),
        build_keys([1, 2, 3, 4], salt="s"),
    ],
)
def test_what_determines_the_values_or_who_may_share_them_is_in_every_key(
    changed: PrefixKeys,
) -> None:
    assert changed.blocks != build_keys([1, 2, 3, 4]).blocks


def test_parts_do_not_run_into_each_other() -> None:
    # A namespace that ends as the policies and a salt would begin.
    plain = build_keys([1] * 4, b"", (), "model")
    assert plain.blocks != build_keys([1] * 4, b"model", (), "").blocks
    assert plain.blocks != build_keys([1] * 4, b"mod", (), "el").blocks


def test_the_first_key_without_the_salt_tells_equal_prefixes() -> None:
    plain, salted = build_keys([1, 2, 3, 4, 5]), build_keys([1, 2, 3, 4, 6], salt="s")
    assert plain.first_unsalted == plain.blocks[0] == salted.first_unsalted
    assert salted.blocks[0] != salted.first_unsalted
    assert build_keys([1, 2, 3, 5], salt="s").first_unsalted != plain.first_unsalted
    assert build_keys([1, 2, 3]).first_unsalted is None


def test_fewer_tokens_than_were_named_leave_the_names() -> None:
    keys = build_keys([1, 2, 3, 4, 5, 6, 7, 8, 9])
    named = keys.blocks.copy()
    for length in (0, 3, 7, 8):
        keys.extend([1, 2, 3, 4, 5, 6, 7, 8][:length])
        assert keys.blocks == named
    keys.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    assert keys.blocks == build_keys(list(range(1, 13))).blocks


def test_a_salt_made_of_tokens_is_no_way_into_another_s_blocks() -> None:
    # Bytes of a first block, and of the parts before it, as text.
    data = pack("<4q", 1, 2, 3, 4)
    identity = pack("<q", 5) + b"model" + pack("<q", 0)
    salts = [part.decode("latin-1") for part in (data, identity, identity + data)]
    plain = build_keys([1, 2, 3, 4, 1, 2, 3, 4], policies=()).blocks
    for salt in salts:
        salted = build_keys([1, 2, 3, 4, 1, 2, 3, 4], policies=(), salt=salt).blocks
        assert set(salted).isdisjoint(plain)


def test_half_a_surrogate_pair_is_a_salt_too() -> None:
    assert build_keys([1] * 4, salt="\ud800").blocks != build_keys([1] * 4, salt="\ud801").blocks


def test_a_copy_goes_its_own_way() -> None:
    keys = build_keys([1, 2, 3, 4])
    copied = keys.copy()
    keys.extend([1, 2, 3, 4, 5, 6, 7, 8])
    copied.extend([1, 2, 3, 4, 9, 9, 9, 9])
    assert copied.blocks == build_keys([1, 2, 3, 4, 9, 9, 9, 9]).blocks
    assert keys.blocks == build_keys([1, 2, 3, 4, 5, 6, 7, 8]).blocks


def test_blocks_with_tokens_that_see_less_have_keys_of_their_own() -> None:
    tokens = list(range(24))
    plain = build_keys(tokens).blocks
    for dense, shared in ((8, 2), (9, 2), (11, 2), (12, 3), (24, 6), (100, 6)):
        own = build_keys(tokens, dense_tokens=dense).blocks
        assert own[:shared] == plain[:shared]
        assert set(own[shared:]).isdisjoint(plain)
    chains = {tuple(build_keys(tokens, dense_tokens=dense).blocks) for dense in range(8, 12)}
    assert len(chains) == 4, "where they begin to see less is in the key"


@given(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=5), st.integers(1, 5))
def test_a_chain_of_its_own_does_not_depend_on_how_a_sequence_grew(
    dense_tokens: int, stops: list[int], block_size: int
) -> None:
    tokens = list(range(30))
    grown = PrefixKeys(b"", POLICIES, "", block_size, dense_tokens)
    for stop in sorted(stops):
        grown.extend(tokens[:stop])
        grown = grown.copy()
    grown.extend(tokens)
    whole = build_keys(tokens, b"", block_size=block_size, dense_tokens=dense_tokens)
    assert grown.blocks == whole.blocks
