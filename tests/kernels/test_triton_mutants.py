"""That the comparison is worth something: kernels with one planted mistake fail it.

A mutant is the real source with one piece of text changed, which must stand there exactly once: so
a mutant cannot become the original unnoticed when the source moves on.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from headlong.cache.policy import HeadPolicy
from support.paged import PagedCase, build_case
from support.triton import (
    check,
    forget,
    geometry,
    make_attention,
    plant,
    short_splits,
    triton_suite,
)

# A split that a mutant leaves empty has the logarithm of nothing.
pytestmark = [
    *triton_suite,
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    # What is read in the wrong place may be no number.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

# Float32 tiles of this size have 32 keys in a decode and 16 in a prefill chunk.
GEOMETRY = geometry(
    retrieval=((True, False),), streaming=HeadPolicy(36, 40), group_size=3, head_dim=64
)
# Rows that are padded; two heads in one group, and one in another of another format.
QUANTISED = replace(
    GEOMETRY,
    retrieval=((True, True, False),),
    head_dim=80,
    formats={"retrieval": "int4", "streaming": "int8"},
)


class Mutant(NamedTuple):
    module: str
    right: str
    wrong: str


def decodes() -> PagedCase:
    """Of one split and of several, the last one of a single key in one of them."""
    return build_case(GEOMETRY, ((50, 1), (128, 1), (160, 1), (210, 1)), seed=1)


def chunks() -> PagedCase:
    """Rows whose own key is the first of a tile of keys; the window's edge inside tiles."""
    return build_case(GEOMETRY, ((0, 65), (100, 40)), seed=2)


@cache
def quantised_decodes() -> PagedCase:
    return build_case(QUANTISED, ((50, 1), (128, 1)), seed=3)


@cache
def quantised_chunks() -> PagedCase:
    return build_case(QUANTISED, ((60, 20),), seed=4)


LAW = "return (j <= t) & ((j < sink_size) | (j > t - window_size))"

LAWS = {
    "a key too many in the window": LAW.replace("j > t -", "j >= t -"),
    "a key too few in the window": LAW.replace("j > t -", "j - 1 > t -"),
    "the next token": LAW.replace("j <= t", "j <= t + 1"),
    "not the token itself": LAW.replace("j <= t", "j < t"),
    "a sink too many": LAW.replace("j < sink_size", "j <= sink_size"),
    "a sink too few": LAW.replace("j < sink_size", "j + 1 < sink_size"),
}

DECODE = {
    "a key lost at the edge of a split": Mutant(
        "triton_split", "last_key = tl.minimum(", "last_key = -1 + tl.minimum("
    ),
    "a split begins a key late": Mutant(
        "triton_split", "first_key = split * SPLIT_KEYS", "first_key = split * SPLIT_KEYS + 1"
    ),
    "a split ends a key late": Mutant(
        "triton_split",
        "tl.minimum(first_key + SPLIT_KEYS,",
        "tl.minimum(first_key + SPLIT_KEYS + 1,",
    ),
    "the second split again": Mutant(
        "triton_split", "first_key = split *", "first_key = tl.minimum(split, 1) *"
    ),
    "a window without its first tile": Mutant(
        "triton_split",
        "tl.maximum(window_low // KEY_ALIGNMENT * KEY_ALIGNMENT",
        "tl.maximum(tl.cdiv(window_low, KEY_ALIGNMENT) * KEY_ALIGNMENT",
    ),
    "splits weighed alike": Mutant(
        "triton_merge", "weights = tl.exp2(lse - bound)", "weights = tl.where(real, 1.0, 0.0)"
    ),
    "earlier splits not weighed anew": Mutant("triton_merge", "acc = acc * kept +", "acc = acc +"),
    "earlier weights forgotten": Mutant("triton_merge", "total = total * kept +", "total ="),
    "the splits of another sequence": Mutant("triton_merge", "(first_split + split)", "split"),
    "the splits of another group": Mutant("triton_merge", "items = items_before +", "items ="),
    "a log-sum-exp of another base": Mutant("triton_decode", "tl.log2(total)", "tl.log(total)"),
    "no learned sink": Mutant(
        "triton_merge", "total = with_sink(total, largest, sink)", "total = total"
    ),
}

PREFILL = {
    "the diagonal without the mask": Mutant(
        "triton_chunk", "(nearest + 1) // KEYS * KEYS", "(nearest + KEYS) // KEYS * KEYS"
    ),
    "the window's edge without the mask": Mutant(
        "triton_chunk",
        "inner = tl.cdiv(tl.maximum(farthest - window_size + 1, 0), KEYS)",
        "inner = (tl.maximum(farthest - window_size + 1, 0) // KEYS)",
    ),
    "the window of the last row": Mutant(
        "triton_chunk", "tl.maximum(nearest - window_size", "tl.maximum(farthest - window_size"
    ),
    "sinks up to a whole tile": Mutant(
        "triton_chunk",
        "sink_end = tl.cdiv(tl.minimum(sink_size, end), KEYS)",
        "sink_end = (tl.minimum(sink_size, end) // KEYS)",
    ),
    "the last key lost": Mutant("triton_chunk", "end = farthest + 1", "end = farthest"),
}

BOTH = {
    "an earlier sum not weighed anew": Mutant(
        "triton_pages", "total = total * kept +", "total = total +"
    ),
    "an earlier result not weighed anew": Mutant(
        "triton_pages", "acc = acc * kept[:, None]", "acc = acc"
    ),
    "no learned sink but of the merge": Mutant(
        "triton_pages", "return total + tl.exp2(sink * LOG2_E - bound)", "return total"
    ),
}

CODES = {
    "the scale of another token": Mutant(
        "triton_pages", "(UNIT // 2) + inside", "(UNIT // 2) + (inside ^ 1)"
    ),
    "scales of keys for values": Mutant(
        "triton_codes", "pointers + (1 << block_shift)", "pointers + 0"
    ),
    "keys without their scale": Mutant("triton_codes", "products *= scales[None, :]", "pass"),
    "values without their scale": Mutant(
        "triton_pages", "raised(weights, scales, FORMAT)", "raised(weights, scales * 0 + 1, FORMAT)"
    ),
    "keys without their minimum": Mutant(
        "triton_codes", "products += query_sums[:, None] * minima[None, :]", "pass"
    ),
    "values without their minimum": Mutant(
        "triton_pages", "acc += tl.sum(raised(weights, minima, FORMAT), 1)[:, None]", "pass"
    ),
    "scales for minima": Mutant(
        "triton_pages",
        "minima_ptr = halves_ptr + (base + tl.load(fields_ptr + 4))",
        "minima_ptr = halves_ptr + (base + tl.load(fields_ptr + 3))",
    ),
    "nibbles swapped": Mutant(
        "triton_codes", "tl.interleave(low, high)", "tl.interleave(high, low)"
    ),
    "codes without a sign": Mutant("triton_codes", "tile = tile.to(tl.int8, bitcast=True)", "pass"),
    "a power of two too many": Mutant("triton_codes", "acc *= 1.0 / 64.0", "acc *= 1.0 / 32.0"),
    "keys for values": Mutant(
        "triton_pages", "values = base + tl.load(fields_ptr + 2)", "values = base"
    ),
    "the page of another head": Mutant(
        "triton_pages", "page.to(tl.int64) * size", "page.to(tl.int64) * 0"
    ),
    "the block of another size": Mutant(
        "triton_pages", "tl.load(fields_ptr + 7) * size", "tl.load(fields_ptr + 7) * size // 2"
    ),
    "the format of another group": Mutant(
        "triton_pages", "groups_ptr + group * GROUPS_FIELDS + 8", "groups_ptr + 8"
    ),
}

APPENDED = {
    "written nibbles swapped": Mutant("triton_append", "low | (high << 4)", "high | (low << 4)"),
    "cut off instead of rounded": Mutant(
        "triton_codes", "+ ROUNDER) - ROUNDER", "+ 0.0).to(tl.int32).to(tl.float32)"
    ),
    "a scale of another number of steps": Mutant(
        "triton_codes", "half_scale(spread, 15.0)", "half_scale(spread, 16.0)"
    ),
    "what pads a row among its elements": Mutant(
        "triton_codes", 'tl.where(real, x, float("inf"))', "tl.where(real, x, -9.0)"
    ),
    "scales of values over those of keys": Mutant(
        "triton_append", "scale_at += 1 << block_shift", "scale_at += 0"
    ),
}

DECODED_CODES = {
    "a sum over what pads the query": Mutant(
        "triton_decode", "mask=wanted, other=0.0)", "mask=wanted, other=1.0)"
    ),
}

PREFILLED_CODES = {
    "a sum over what pads the query": Mutant(
        "triton_prefill", "mask=wanted, other=0.0)", "mask=wanted, other=1.0)"
    ),
}

MUTANTS = [
    pytest.param(make_case, mutant, id=f"{make_case.__name__}: {name}")
    for make_case, mutants in (
        (decodes, {name: Mutant("triton_pages", LAW, wrong) for name, wrong in LAWS.items()}),
        (chunks, {name: Mutant("triton_pages", LAW, wrong) for name, wrong in LAWS.items()}),
        (decodes, DECODE | BOTH),
        (chunks, PREFILL | BOTH),
        (quantised_decodes, CODES | APPENDED | DECODED_CODES),
        (quantised_chunks, CODES | PREFILLED_CODES),
    )
    for name, mutant in mutants.items()
]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mutant], str]]:
    """Plants a mutant, with short splits; the package it lies in."""
    name = "mutant_kernels"

    def make(mutant: Mutant) -> str:
        plant(tmp_path, name, *mutant)
        short_splits(monkeypatch, name)
        return name

    yield make
    forget(name)


def compare(case: PagedCase, package: str) -> None:
    sinks = torch.linspace(-1, 3, case.geometry.num_q_heads)
    check(case, make_attention(case, package), sinks=sinks)


@pytest.mark.parametrize("make_case", [decodes, chunks, quantised_decodes, quantised_chunks])
def test_the_original_passes(
    make_case: Callable[[], PagedCase], kernels: Callable[[Mutant], str]
) -> None:
    compare(make_case(), kernels(Mutant("triton_pages", LAW, LAW)))


@pytest.mark.parametrize(("make_case", "mutant"), MUTANTS)
def test_a_mutant_is_caught(
    make_case: Callable[[], PagedCase], mutant: Mutant, kernels: Callable[[Mutant], str]
) -> None:
    assert mutant.wrong != mutant.right
    package = kernels(mutant)
    with pytest.raises(AssertionError, match="off the reference by"):
        compare(make_case(), package)
