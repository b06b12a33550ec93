"""That the comparisons of bounds, sums and compensation are worth something: mutants fail them."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference_summaries
from support.summarised import Growing, Setting, by_reference, check_summaries
from support.triton import (
    check_attention,
    forget,
    plant,
    short_splits,
    triton_append,
    triton_suite,
)

pytestmark = triton_suite

SPAN_BLOCKS = 3
"""So that a short sequence has several spans."""


class Mutant(NamedTuple):
    module: str
    right: str
    wrong: str


BOUNDS = {
    "a former owner's maximum": Mutant(
        "triton_bounds",
        'greatest = tl.full([DIM], float("-inf"), tl.float32)',
        "greatest = tl.load(bounds_ptr + block * block_elements + HEAD_DIM + dims)",
    ),
    "slots without a token": Mutant(
        "triton_bounds", "tl.minimum((logical + 1) << block_shift, context)", "(logical + 1) * 8"
    ),
    "a span that is not begun anew": Mutant(
        "triton_bounds", "real & (first % SPAN > 0)", "real & (first > 0)"
    ),
    "a span that forgets earlier steps": Mutant(
        "triton_bounds", "real & (first % SPAN > 0)", "real & (first < 0)"
    ),
    "a span of its own page": Mutant(
        "triton_bounds", "tl.maximum(span_greatest, greatest)", "greatest"
    ),
    "minimum and maximum swapped": Mutant(
        "triton_bounds", "least = tl.minimum(least,", "least = tl.maximum(least,"
    ),
    "the next block's page": Mutant("triton_bounds", "load_block(first - 1,", "load_block(first,"),
}

SUMS = {
    "sinks among them": Mutant("triton_sums", "(positions >= sink_size)", "(positions >= 0)"),
    "earlier blocks forgotten": Mutant("triton_sums", "real & (first > 0)", "real & (first < 0)"),
    "the first block again and again": Mutant("triton_sums", "before = block", "before = before"),
    "a token too few": Mutant(
        "triton_sums",
        "positions < logical << block_shift",
        "positions + 1 < logical << block_shift",
    ),
    "keys for values": Mutant(
        "triton_sums", "tl.where(which == 0, keys_ptr, values_ptr)", "keys_ptr"
    ),
    "scales of keys for values": Mutant(
        "triton_sums", "scales_ptr += which <<", "scales_ptr += 0 <<"
    ),
    "minima left out": Mutant("triton_rows", "tile += minima", "tile += 0 * minima"),
}

COMPENSATION = {
    "ln N forgotten": Mutant("triton_compensation", " + tl.log2(counts)", ""),
    "ln N of another base": Mutant("triton_compensation", "tl.log2(counts)", "tl.log(counts)"),
    "keys not divided": Mutant("triton_compensation", "products / counts", "products"),
    "values not divided": Mutant("triton_compensation", "acc / counts[:, None]", "acc"),
    "a token too many": Mutant(
        "triton_compensation", "farthest) - window_size + 1", "farthest) - window_size + 2"
    ),
    "a token too few": Mutant(
        "triton_compensation", "farthest) - window_size + 1", "farthest) - window_size"
    ),
    "sinks counted": Mutant(
        "triton_compensation", "tl.maximum(first_visible, 0) - sink_size", "first_visible"
    ),
    "tokens of the last block left out of the logit": Mutant(
        "triton_compensation", "products += tl.sum", "products += 0 * tl.sum"
    ),
    "tokens of other rows": Mutant(
        "triton_compensation", "positions < ends[:, None]", "positions >= 0"
    ),
    "sums of keys for values": Mutant("triton_compensation", "pointers + HEAD_DIM,", "pointers,"),
    "sums not as large as codes": Mutant(
        "triton_compensation", "sums = raised(sums,", "raised(sums,"
    ),
    "minima of values left out": Mutant(
        "triton_compensation", "acc += tl.sum(raised(weights", "acc += 0 * tl.sum(raised(weights"
    ),
    "in every split": Mutant(
        "triton_split", "is_compensated & (split == 0)", "is_compensated & (split >= 0)"
    ),
}


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mutant], str]]:
    """Plants a mutant, with short splits and spans; the package it lies in."""
    name = "summary_mutants"

    def make(mutant: Mutant) -> str:
        plant(tmp_path, name, *mutant)
        short_splits(monkeypatch, name)
        constexpr = import_module("triton.language").constexpr
        monkeypatch.setattr(reference_summaries, "SPAN_BLOCKS", SPAN_BLOCKS)
        monkeypatch.setattr(import_module(f"{name}.triton_bounds"), "SPAN", constexpr(SPAN_BLOCKS))
        monkeypatch.setattr(import_module(f"{name}.triton_summaries"), "SPAN_BLOCKS", SPAN_BLOCKS)
        return name

    yield make
    forget(name)


def compare_summaries(package: str) -> None:
    """Blocks that begin in a step and in a later one, over spans; pages that were another's."""
    setting = Setting(HeadPolicy(5, 12), streaming_format="int4")
    found, expected = (
        Growing(setting, append, (None, None), former=100.0)
        for append in (triton_append(package), by_reference)
    )
    for num_new in ([16, 3], [49, 1], [1, 20]):
        found.step(num_new)
        expected.step(num_new)
    check_summaries(found, expected)


def compare_attention(package: str) -> None:
    """Decodes of one split and of several, and a chunk, in which windows leave tokens behind."""
    for form in (None, "int4"):
        setting = Setting(HeadPolicy(5, 12), block_size=16, streaming_format=form)
        growing = Growing(setting, by_reference, (None, HeadPolicy(5, 70), None))
        growing.step([30, 100, 21])
        check_attention(growing, growing.step([1, 1, 9]), package=package)


UNCHANGED = Mutant("triton_sums", "running += own", "running += own")


def test_the_original_passes(kernels: Callable[[Mutant], str]) -> None:
    package = kernels(UNCHANGED)
    compare_summaries(package)
    compare_attention(package)


@pytest.mark.parametrize("mutant", [*BOUNDS.values(), *SUMS.values()], ids=[*BOUNDS, *SUMS])
def test_a_mutant_of_summaries_is_caught(mutant: Mutant, kernels: Callable[[Mutant], str]) -> None:
    package = kernels(mutant)
    with pytest.raises(AssertionError):
        compare_summaries(package)


@pytest.mark.parametrize("mutant", COMPENSATION.values(), ids=COMPENSATION)
def test_a_mutant_of_compensation_is_caught(
    mutant: Mutant, kernels: Callable[[Mutant], str]
) -> None:
    package = kernels(mutant)
    with pytest.raises(AssertionError, match="off the reference by"):
        compare_attention(package)
