"""Part "context" of benchmarks/gpu.py: what it counts, what it fills pages with, what it tells."""

import time
from dataclasses import replace
from pathlib import Path

import gpu_context
import gpu_context_layers
import gpu_host_tier
import gpu_report
import pytest
import torch
from gpu_context_engine import EngineCell, decode
from gpu_context_layers import LayerCell
from gpu_device import Device
from gpu_figures_context import context_targets
from gpu_fill import fill_pages
from gpu_layers import Kind
from gpu_models import DRY_SHAPE, Models
from gpu_paged import (
    DUO_ATTENTION,
    GQA,
    Chunk,
    HeadShape,
    Pages,
    all_heads,
    build_paged,
    even_labels,
)
from gpu_session import Entry, Results, Session

from headlong.cache.transfers import Move, ThreadMover
from headlong.kernels.codes import Codes, dequantise
from headlong.kernels.layout import QUANTISATIONS, view_pages

LONG, LONGER = 128 * 1024, 1024 * 1024


def session(folder: Path) -> Session:
    results = Results(folder / "gpu.json", {"name": "a GPU", "torch": "2.11"})
    return Session(Device(), results, time.monotonic() + 100)


def attend(ms: float, read_bytes: float, cell: LayerCell) -> Entry:
    return {
        "status": "ok", "kind": "attend", **cell.entry(), "dtype": "bfloat16", "method": "graph",
        "median_ms": ms, "read_bytes": read_bytes, "bytes_per_s": 1e3 * read_bytes / ms,
    }  # fmt: skip


def engine(ms: float, context: int, label: str) -> Entry:
    return {
        "status": "ok", "kind": "engine", "model": "Llama", "label": label, "context": context,
        "retrieval": 0.5, "budget": None, "cuda_graphs": True, "median_ms": ms,
        "peak_bytes": 1 << 34, "cache_bytes": 1 << 33,
    }  # fmt: skip


def moved(kind: str, direction: str, rate: float, **fields: object) -> Entry:
    return {"status": "ok", "kind": kind, "direction": direction, "bytes_per_s": rate, **fields}


BLOCKS = {"form": "int4", "block_size": 16, "block_bytes": 278528}
ENTRIES = (
    attend(1.0, 4e9, LayerCell(GQA, LONGER)),
    attend(0.4, 1e9, LayerCell(GQA, LONGER, form="int4")),
    attend(0.14, 5e8, LayerCell(GQA, LONG)),
    attend(0.02, 2e7, LayerCell(GQA, LONG, budget=4096, reuse=4)),
    attend(0.024, 2e7, LayerCell(GQA, LONGER, budget=4096, reuse=4)),
    attend(0.004, 0.0, LayerCell(GQA, LONG)) | {"kind": "append", "method": "launches"},
    engine(20.0, LONGER, "bf16"),
    engine(6.0, LONGER, "budget 4096"),
    engine(3.0, LONG, "budget 4096"),
    moved("link", "store", 50e9),
    moved("link", "load", 55e9),
    moved("tier", "store", 45e9, **BLOCKS),
    moved("tier", "load", 22e9, **BLOCKS),
    moved("tier", "both", 60e9, **BLOCKS),
)
PARTS = {"context": {str(number): entry for number, entry in enumerate(ENTRIES)}}


def test_targets() -> None:
    found = {each.name: (each.measured, each.verdict) for each in context_targets(PARTS)}
    assert found == {
        "decode attention, gqa 1 x 1024k, int4: of the ideal": (pytest.approx(0.625), "missed"),
        "decode attention, gqa 1 x 1024k, int8: of the ideal": (None, "not measured"),
        "decode attention, gqa 1 x 1024k, fp8: of the ideal": (None, "not measured"),
        "attention of chosen pages: time at 128k over time at 1024k": (
            pytest.approx(1 / 1.2), "reached",
        ),
        "attention of chosen pages at 128k: over all pages": (pytest.approx(7.0), "missed"),
        "engine, chosen pages: time at 128k over time at 1024k": (0.5, "missed"),
        "engine, chosen pages at 1024k: over all pages": (pytest.approx(20 / 6), "reached"),
        "host tier, slowest store of blocks: of the link": (pytest.approx(0.9), "reached"),
        "host tier, slowest load of blocks: of the link": (pytest.approx(0.4), "missed"),
        "host tier, slowest both of blocks: of the link": (None, "not measured"),
    }  # fmt: skip


def test_tables(tmp_path: Path) -> None:
    results = session(tmp_path).results
    results.parts = PARTS
    rows = [" ".join(line.split()) for line in gpu_report.lines(results)]
    assert "1 x 1024k int4 100% 16 400.0 953.7 2.50 2.50x 62%" in rows
    assert "1 x 128k bfloat16 100% 16 140.0 476.8 3.57" in rows
    assert "1 x 128k bfloat16 100% 16 4096 4 20.0 19.1 140.0 7.00x" in rows
    assert "1 x 1024k bfloat16 100% 16 4096 4 24.0 19.1 1000.0 41.67x 1.20x" in rows
    assert "1 x 128k bfloat16 100% 16 no 4.0 (no graphs)" in rows
    assert "blocks of 16, int4 272 load 22.0 40%" in rows
    assert "Llama 1024k budget 4096 50% 6.00 3.33x 16.0 8.0" in rows


@pytest.mark.parametrize("form", [None, *QUANTISATIONS])
def test_pages_are_filled_with_numbers(form: str | None) -> None:
    pages = Pages(16, 32, torch.bfloat16, all_heads(form), summarised=True, compensated=True)
    labels = even_labels(2, 2, 0.5)
    paged = build_paged(labels, DUO_ATTENTION, pages, [Chunk(600, 1)], torch.device("cpu"))
    paged.arena.fill_(0xFF)
    fill_pages(paged.layout, paged.arena)
    for group in range(2):
        views = view_pages(paged.layout, paged.arena, group)
        for which, section in enumerate((views.keys, views.values)):
            held = section
            if form is not None:
                assert views.scales is not None
                minima = None if views.minima is None else views.minima[:, :, which]
                codes = Codes(section, views.scales[:, :, which], minima)
                held = dequantise(codes, QUANTISATIONS[form])
            assert held.isfinite().all()
            assert 0.1 < held.float().std() < 2.0
        summaries = views.bounds if group == 0 else views.sums
        assert summaries is not None
        assert summaries.isfinite().all()
    bounds = view_pages(paged.layout, paged.arena, 0).bounds
    assert bounds is not None
    assert (bounds[:, :, 0::2] <= bounds[:, :, 1::2]).all()


@pytest.mark.parametrize(("form", "token_bytes"), [(None, 512), ("fp8", 260), ("int4", 136)])
def test_bytes_of_quantised_and_chosen_pages(form: str | None, token_bytes: int) -> None:
    pages = Pages(16, 128, torch.bfloat16, all_heads(form), summarised=True, compensated=True)
    labels = even_labels(1, 8, 0.5)
    chunks = [Chunk(16 * 6400 - 1, 1), Chunk(2000, 1)]
    paged = build_paged(labels, DUO_ATTENTION, pages, chunks, torch.device("meta"))
    streaming = 4 * 2 * (384 * token_bytes + 2 * 4 * 128)
    assert paged.read_bytes(0) == 4 * (102400 + 2001) * token_bytes + streaming
    assert paged.read_bytes(0, 4096) == 4 * (4096 + 2001) * token_bytes + streaming
    # 200 spans, of which the pages of 32 are looked at; the short one chooses nothing.
    assert paged.choice_bytes(0, 4096) == 4 * (200 + 32 * 32) * 2 * 128 * 2


@pytest.mark.parametrize("context", [LONG, LONGER])
def test_layers_that_take_turns_outgrow_the_l2_and_fit_a_device(context: int) -> None:
    kind, mib = gpu_context.REAL.kind, 1 << 20
    plain = LayerCell(GQA, context, budget=4096)
    int4 = LayerCell(GQA, context, form="int4", budget=4096)
    assert plain.num_layers(kind) * 16 * mib >= 128 * mib
    assert int4.num_layers(kind) * 4 * mib >= 120 * mib
    assert LayerCell(GQA, LONG, form="int4").num_layers(kind) * 136 * mib >= kind.least_bytes
    for cell in (*gpu_context.REAL.attention, *gpu_context.REAL.more_attention):
        held = cell.num_layers(kind) * cell.batch * cell.context // cell.block_size
        held *= GQA.num_kv_heads * cell.pages(kind).page("retrieval").page_bytes
        assert held < 48 << 30


def test_cells_have_names_of_their_own() -> None:
    for settings in (gpu_context.REAL, gpu_context.DRY):
        names = [
            *(f"attend {each.name}" for each in settings.attention + settings.more_attention),
            *(f"append {each.name}" for each in settings.appends),
            *(each.name for each in settings.engines),
        ]
        assert len(set(names)) == len(names)


def test_a_mover_that_mixes_blocks_up_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = gpu_context.DRY.tiers
    (cell,) = settings.cells
    work = session(tmp_path)
    assert gpu_host_tier.tier(work, settings, cell, "both")["status"] == "ok"
    right = ThreadMover.load

    def mixed(self: ThreadMover, moves: list[Move]) -> None:
        right(self, [replace(move, offset=moves[0].offset) for move in moves])

    monkeypatch.setattr(ThreadMover, "load", mixed)
    entry = gpu_host_tier.tier(work, settings, cell, "store")
    assert (entry["status"], entry["why"]) == (
        "failed", "blocks came back as others than they went",
    )  # fmt: skip
    work.results.put("context", "tier", entry)
    assert gpu_report.summary(work.results)["wrong"] == [entry["why"]]


def test_weights_that_need_an_absent_package_are_skipped_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_context_engine.find_spec", lambda name: None)
    work = session(tmp_path)
    models = Models(gpu_context.DRY.engine_kind, work.device)
    cell = EngineCell("int8 weights", 40, quantization="int8wo")
    entry = decode(work, models, DRY_SHAPE, cell, 1)
    assert entry["status"] == "skipped"
    assert "torchao" in entry["why"]


def test_weights_in_eight_bits_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    work = session(tmp_path)
    models = Models(replace(gpu_context.DRY.engine_kind, backend="torch"), work.device)
    cell = EngineCell("int8 weights", 40, kv_cache_dtype="int4", quantization="int8wo")
    entry = decode(work, models, DRY_SHAPE, cell, 1)
    assert (entry["label"], entry["repeats"]) == ("int8 weights", 1)
    assert models.has(DRY_SHAPE, "int8wo")
    assert not models.has(DRY_SHAPE)


def test_what_is_appended_begins_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Chunk]] = []

    def make(kind: Kind, heads: HeadShape, chunks: list[Chunk], **options: object) -> object:
        made.append(chunks)
        raise NotImplementedError

    monkeypatch.setattr(gpu_context_layers, "PagedLayers", make)
    for cell in gpu_context.REAL.appends:
        with pytest.raises(NotImplementedError):
            gpu_context_layers.append(session(tmp_path), gpu_context.REAL.kind, cell)
        (*_, chunks) = made
        assert len(chunks) == cell.batch
        assert {chunk.cached % cell.block_size for chunk in chunks} == {0}


def test_blocks_that_never_arrive_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = gpu_context.DRY.tiers
    monkeypatch.setattr(ThreadMover, "wait", lambda self, timeout_s: None)
    monkeypatch.setattr(ThreadMover, "finished", lambda self: [])
    with pytest.raises(RuntimeError, match="no block arrived within 60 s"):
        gpu_host_tier.tier(session(tmp_path), settings, settings.cells[0], "store")


def test_an_engine_s_cache_holds_its_sequence_and_no_more(tmp_path: Path) -> None:
    kind = replace(gpu_context.DRY.engine_kind, backend="torch")
    model = Models(kind, Device()).take(DRY_SHAPE)
    held = [
        model.engine(share, 2000, eager=True, block_size=8).arena.layout.total_bytes
        for share in (1.0, 0.25)
    ]
    assert held[1] < 0.3 * held[0]
