"""Part "kernels-check": every kernel against the float64 reference, before any of them is timed.

A case is a batch of decodes and prefill chunks over one arena. Whatever nobody wrote is NaN: the
arena's unwritten slots, and every buffer that a kernel is to fill. Checked are

- append: the arena is bit for bit the reference's, codes, scales and bounds with it; but for sums,
  whose tokens the reference adds up in another order: they may be SUMS_TOLERANCE away;
- choices: the pages that a head reads are the best by the reference's scores, or near enough;
- attend: ||out - reference|| / ||reference|| of every sequence, where NaN never passes;
- invariance: each sequence alone, and the batch a second time, give the same bits, and so does a
  step that keeps its choices;
- distance: an arena of more than 2**31 elements gives the bits of a small one.

Cases are shared out among processes, because most of their time goes into compiling kernels.
"""

import contextlib
import dataclasses
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from gpu_check_cases import DRY, REAL, Case, Settings
from gpu_check_choices import check_choices, kept_choices
from gpu_fill import NAN_BYTE
from gpu_paged import Paged, build_paged
from gpu_session import Entry, Session

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference
from headlong.kernels.backend import make_backend
from headlong.kernels.batch import UNBOUNDED, AttentionBatch, SelectionBatch, SelectionSettings
from headlong.kernels.layout import view_pages
from headlong.kernels.reference_selection import Choices
from headlong.server.engine.batch import build_attention_batch

if TYPE_CHECKING:
    from headlong.kernels.triton_attention import TritonAttention

__all__ = ["DRY", "PART", "REAL", "Case", "Settings"]

PART = "kernels-check"

SUMS_TOLERANCE = 1e-4
"""Of one element of sums; a token that is missing makes a difference of about 1."""

LABELS = ((True, False, True), (False, True, False))
"""Two layers with both kinds of heads; the second is computed, whose pages are not the first."""
LAYER = 1


def run(session: Session, settings: Settings) -> None:
    wanted = [case for case in settings.cases if session.wanted(PART, case.name)]
    device = session.device.torch_device.type
    with _pool(min(settings.processes, len(wanted))) as pool:
        running: dict[str, Future[Entry]] = {}
        if pool is not None and session.left_s > 0:
            running = {case.name: pool.submit(check, device, case) for case in wanted}
        for case in settings.cases:

            def work(case: Case = case) -> Entry:
                if case.name not in running:
                    return check(device, case)
                return running[case.name].result(timeout=max(1.0, session.left_s))

            session.measure(PART, case.name, work, needs_s=5.0)
        for future in running.values():
            future.cancel()
    session.measure(
        PART,
        f"arena of {settings.distant_elements} elements",
        lambda: check_distance(device, settings),
        needs_s=5.0,
    )


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    if processes < 1:
        yield None
        return
    # A process that has used CUDA must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(2,)
    ) as pool:
        yield pool


def check(device: str, case: Case) -> Entry:
    """Run one case; its entry's status says whether it passed."""
    made = Made(torch.device(device), case)
    problems: list[str] = []
    if not made.appends_like_reference():
        problems.append("append differs from the reference")
    out = made.attend()
    problems += made.wrong_choices()
    errors = made.errors(out)
    for chunk, error in zip(case.chunks, errors, strict=True):
        if not error <= case.tolerance:
            problems.append(f"{chunk.new} after {chunk.cached} tokens: error {error:.2e}")
    if not same_bits(out, made.attend()):
        problems.append("a second run gives other bits")
    for index, chunk in enumerate(case.chunks):
        rows = slice(*made.paged.batch.cu_seqlens_q[index : index + 2].tolist())
        if not same_bits(out[rows], made.attend([index])):
            problems.append(f"{chunk.new} after {chunk.cached} tokens: other bits alone")
    if case.budget is not None:
        problems += made.wrong_later_choices(out)
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return {
        "status": "failed" if problems else "ok",
        "why": "; ".join(problems[:4]),
        "dtype": str(case.dtype).removeprefix("torch."),
        "formats": [form for _, form in case.formats],
        "error": worst,
        "tolerance": case.tolerance,
    }


def check_distance(device: str, settings: Settings) -> Entry:
    """The first case's pages once where they are, and once far away in a larger arena."""
    made = Made(torch.device(device), settings.cases[0])
    made.append()
    near = made.attend()
    made.move_away(settings.distant_elements)
    same = same_bits(near, made.attend())
    return {
        "status": "ok" if same else "failed",
        "why": "" if same else "other bits than in a small arena",
        "bytes": made.paged.arena.numel(),
    }


class Made:
    """A case in memory: an arena filled up to the new tokens, and those tokens' q, k and v."""

    def __init__(self, device: torch.device, case: Case) -> None:
        self.case = case
        self.device = device
        self.generator = torch.Generator(device)
        self.generator.manual_seed(0)
        streaming = HeadPolicy(case.sink_size, case.window_size)
        windows = (None, case.native_window)
        self.paged: Paged = build_paged(LABELS, streaming, case.pages, case.chunks, device, windows)
        self._selects(renews=True)
        self.paged.fill_cached(self.generator)
        num_kv_heads = len(LABELS[LAYER])
        self.num_q_heads = num_kv_heads * case.group_size
        self.query = self._draw(self.num_q_heads)
        self.key, self.value = self._draw(num_kv_heads), self._draw(num_kv_heads)
        self.sinks = None
        if case.learned_sinks:
            self.sinks = torch.randn(self.num_q_heads, device=device, generator=self.generator)
        self._take_arena(self.paged.arena)

    def _draw(self, heads: int) -> torch.Tensor:
        """Random [heads, total_tokens, head_dim]."""
        shape = heads, int(self.paged.batch.cu_seqlens_q[-1]), self.case.head_dim
        drawn = torch.randn(shape, device=self.device, generator=self.generator)
        return drawn.to(self.case.dtype)

    def _take_arena(self, arena: torch.Tensor) -> None:
        self.paged.arena = arena
        case, longest = self.case, max(chunk.cached + chunk.new for chunk in self.paged.chunks)
        settings = None
        if case.budget is not None:
            places = 1 + len(case.chunks)
            settings = SelectionSettings(case.budget, places, longest, case.min_similarity)
        self.backend = make_backend("triton", arena, self.paged.layout, self.num_q_heads, settings)

    def _selects(self, *, renews: bool) -> None:
        """Put decodes under the budget, each in a place of its own."""
        if self.case.budget is None:
            return
        decodes = torch.tensor([chunk.new == 1 for chunk in self.case.chunks])
        places = torch.arange(1, 1 + len(decodes), dtype=torch.int32)
        budgets = torch.where(decodes, self.case.budget, UNBOUNDED).int()
        chosen = SelectionBatch(budgets, places * decodes, torch.full_like(decodes, renews))
        self.paged.batch = dataclasses.replace(self.paged.batch, selection=chosen)

    def append(self) -> None:
        plan = self.backend.plan(self.paged.batch)
        self.backend.append(LAYER, self.key, self.value, plan)

    def appends_like_reference(self) -> bool:
        """Append, and compare the whole arena; of sums, only that they are near."""
        expected = self.paged.arena.to("cpu", copy=True)
        key, value = (each.transpose(0, 1).cpu() for each in (self.key, self.value))
        paged = self.paged
        reference.append(expected, paged.layout, LAYER, key, value, paged.batch)
        self.append()
        found = paged.arena.to("cpu", copy=True)
        for group in range(paged.layout.num_groups):
            sums = view_pages(paged.layout, found, group).sums
            wanted = view_pages(paged.layout, expected, group).sums
            if sums is None or wanted is None:
                continue
            if not torch.allclose(sums, wanted, rtol=0.0, atol=SUMS_TOLERANCE, equal_nan=True):
                return False
            sums.copy_(wanted)
        return torch.equal(found, expected)

    def attend(self, chosen: Sequence[int] | None = None) -> torch.Tensor:
        """Attention of the batch, or of a batch of some of its sequences."""
        batch, query = self.paged.batch, self.query
        if chosen is not None:
            bounds = batch.cu_seqlens_q.tolist()
            rows = [row for index in chosen for row in range(bounds[index], bounds[index + 1])]
            query = query[:, rows]
            batch = build_attention_batch(
                [self.paged.sequences[index] for index in chosen],
                [self.paged.chunks[index].new for index in chosen],
                _some(batch, chosen),
            )
        with poisoned_allocations():
            return self.backend.attend(
                LAYER,
                query,
                self.backend.plan(batch),
                sm_scale=self.case.head_dim**-0.5,
                softcap=self.case.softcap,
                sinks=self.sinks,
            )

    def errors(self, out: torch.Tensor) -> list[float]:
        """||out - reference|| / ||reference|| of each sequence."""
        paged, batch = self.paged, self.paged.batch
        if batch.selection is not None:
            # The reference reads what the device chose: the rest is to be right, ties or not.
            keeps = torch.zeros_like(batch.selection.renews)
            selection = dataclasses.replace(batch.selection, renews=keeps)
            batch = dataclasses.replace(batch, selection=selection)
        expected = reference.attend(
            self.query.transpose(0, 1).cpu(),
            paged.arena.cpu(),
            paged.layout,
            LAYER,
            batch,
            sm_scale=self.case.head_dim**-0.5,
            softcap=self.case.softcap,
            sinks=None if self.sinks is None else self.sinks.cpu(),
            choices=self._kept(),
        )
        bounds = paged.batch.cu_seqlens_q.tolist()
        found: list[float] = []
        for first, last in pairwise(bounds):
            want = expected[first:last]
            got = out[first:last].cpu().double()
            found.append(float((got - want).norm() / want.norm()))
        return found

    def wrong_choices(self) -> list[str]:
        """What of the last step's choices the reference would not have made."""
        kept = self._kept()
        if kept is None:
            return []
        arena, query = self.paged.arena.cpu(), self.query.transpose(0, 1).cpu()
        return check_choices(kept, query, arena, self.paged.layout, LAYER, self.paged.batch)

    def wrong_later_choices(self, out: torch.Tensor) -> list[str]:
        """Go on with the choices of `out`, then with queries that have drifted away from them."""
        problems: list[str] = []
        self._selects(renews=False)
        if not same_bits(out, self.attend()):
            problems.append("choices that are kept give other bits")
        if self.case.min_similarity is not None:
            self.query = -self.query
            self.attend()
            problems += [f"after a drift, {each}" for each in self.wrong_choices()]
        return problems

    def _kept(self) -> Choices | None:
        """What the device remembers, for the reference to read; None without a budget."""
        if self.case.budget is None:
            return None
        selection = cast("TritonAttention", self.backend).page_selection
        assert selection is not None
        chosen, _ = selection.remembered(LAYER)
        return kept_choices(chosen.cpu(), self.paged.layout, LAYER, self.paged.batch)

    def move_away(self, elements: int) -> None:
        """Copy every group's blocks to the end of a group that is larger by so many elements."""
        old, old_arena, batch = self.paged.layout, self.paged.arena, self.paged.batch
        itemsize = self.case.dtype.itemsize
        shifts = [
            -(-elements * itemsize // old.block_bytes(group)) if group == 0 else 0
            for group in range(old.num_groups)
        ]
        num_blocks = tuple(
            count + shift for count, shift in zip(old.num_blocks, shifts, strict=True)
        )
        moved = shifts[0] * old.block_bytes(0)
        layout = dataclasses.replace(
            old,
            num_blocks=num_blocks,
            group_bases=(0, *(base + moved for base in old.group_bases[1:])),
            total_bytes=old.total_bytes + moved,
        )
        arena = torch.empty(layout.total_bytes, dtype=torch.uint8, device=self.device)
        layout.view_group(arena, 0).fill_(NAN_BYTE)
        for group, shift in enumerate(shifts):
            old_pages = old.view_group(old_arena, group)
            layout.view_group(arena, group)[shift:].copy_(old_pages)
        self.paged.batch = dataclasses.replace(
            batch,
            groups=tuple(
                dataclasses.replace(
                    group,
                    block_tables=group.block_tables + shift,
                    slot_mapping=group.slot_mapping + shift * self.case.block_size,
                )
                for group, shift in zip(batch.groups, shifts, strict=True)
            ),
        )
        self.paged.layout = layout
        self._take_arena(arena)


def _some(batch: AttentionBatch, chosen: Sequence[int]) -> SelectionBatch | None:
    """What some of a batch's sequences may read."""
    every = batch.selection
    if every is None:
        return None
    rows = list(chosen)
    return SelectionBatch(every.budgets[rows], every.places[rows], every.renews[rows])


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Whatever is allocated without a value is NaN."""
    # PyTorch fills what `empty` and its like return when algorithms are to be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
