"""Ratios and tables of made-up measurements, and what work is counted as."""

from pathlib import Path

import gpu_figures
import gpu_plot
import gpu_report
import pytest
import torch
from gpu_layers import DecodeShape, Kind
from gpu_models import LLAMA_2_7B, LLAMA_3_8B, random_labels
from gpu_paged import DUO_ATTENTION, GQA, Chunk, Pages, build_paged, even_labels, visible_pairs
from gpu_session import Entry, Results

CONTEXT = 1 << 17


def kernel(kind: str, ms: float, **fields: object) -> Entry:
    return {
        "status": "ok", "kind": kind, "heads": "gqa", "context": CONTEXT, "median_ms": ms,
        "bytes_per_s": 4e9 / ms, "flops_per_s": 1e12 / ms, "read_bytes": 4_000_000, **fields,
    }  # fmt: skip


def engine(part: str, heads: str, retrieval: float, value: float, **fields: object) -> Entry:
    field = {"decode": "median_ms", "prefill": "total_s"}[part]
    cell = {"decode": {"context": CONTEXT, "eager": False}, "prefill": {"tokens": CONTEXT}}[part]
    return {
        "status": "ok", "model": f"the {heads} model", "heads": heads, "retrieval": retrieval,
        "peak_bytes": 1 << 34, "cache_bytes": 1 << 33, "cuda_graphs": True, "tokens_per_s": 1.0,
        field: value, **cell, **fields,
    }  # fmt: skip


PARTS = {
    "kernels-check": {
        "a": {"status": "ok", "dtype": "float32", "error": 1e-7, "tolerance": 2e-6},
        "b": {
            "status": "failed", "dtype": "float32", "error": 1e-3, "tolerance": 2e-6, "why": "far",
        },
        "c": {
            "status": "ok", "dtype": "float32", "formats": ["int4"], "error": 3e-6,
            "tolerance": 4e-6,
        },
    },
    "ceilings": {
        "copy": {"status": "ok", "kind": "copy", "bytes_per_s": 4e12},
        "copy larger": {"status": "ok", "kind": "copy", "bytes_per_s": 4.5e12},
        "matmul": {"status": "ok", "kind": "matmul", "flops_per_s": 8e14},
    },
    "kernels": {
        "full": kernel("decode", 1.0, batch=8, block_size=16, retrieval=1.0, bytes_per_s=4.05e12),
        "half": kernel(
            "decode", 0.6, batch=8, block_size=16, retrieval=0.5, read_bytes=2_000_000
        ),
        "flash": kernel("decode", 1.1, batch=8, peer="flash folded", method="graph"),
        "cudnn": kernel("decode", 0.9, batch=8, peer="cudnn", method="graph"),
        "other batch": kernel("decode", 0.1, batch=1, peer="flash", method="graph"),
        "prefill": kernel("prefill", 20.0, chunk=CONTEXT, block_size=16, retrieval=1.0),
        "prefill flash": kernel("prefill", 18.0, chunk=CONTEXT, peer="flash"),
        "broken": {"status": "error", "why": "no kernel", "kind": "prefill"},
    },
    "decode": {
        "full": engine("decode", "gqa", 1.0, 20.0),
        "half": engine("decode", "gqa", 0.5, 12.5),
        "half eager": engine("decode", "gqa", 0.5, 1.0, eager=True),
        "late": {"status": "skipped", "why": "needs about 6 s, 0 s were left"},
    },
    "prefill": {
        "full": engine("prefill", "mha", 1.0, 30.0),
        "quarter": engine("prefill", "mha", 0.25, 20.0),
    },
    "tuning": {
        "own": {"status": "ok", "work": "decode", "change": {}, "median_ms": 1.0},
        "other": {"status": "ok", "work": "decode", "change": {"KEYS": 32}, "median_ms": 0.9},
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = Results(tmp_path / "gpu.json", {"name": "a GPU", "torch": "2.11"})
    found.parts = PARTS
    return found


def test_targets() -> None:
    found = {each.name: (each.measured, each.verdict) for each in gpu_figures.targets(PARTS)}
    flash = "slowest against torch's FlashAttention"
    assert found == {
        "decode attention, gqa 8 x 128k: of copy bandwidth": (0.9, "reached"),
        "decode attention, gqa 8 x 128k, half streaming: of the ideal": (
            pytest.approx(1 / 1.2), "missed",
        ),
        f"decode attention, {flash}": (pytest.approx(1.1), "reached"),
        f"prefill attention, {flash}": (pytest.approx(0.9), "missed"),
        "engine decode, gqa with 50% retrieval: over all retrieval": (1.6, "reached"),
        "engine decode, mha with 25% retrieval: over all retrieval": (None, "not measured"),
        "engine prefill, gqa with 50% retrieval: over all retrieval": (None, "not measured"),
        "engine prefill, mha with 25% retrieval: over all retrieval": (1.5, "missed"),
    }  # fmt: skip


def test_tables_hold_the_figures_and_say_what_is_missing(results: Results) -> None:
    text = "\n".join(gpu_report.lines(results))
    (row,) = [line.split() for line in text.splitlines() if "100%" in line and "8 x 128k" in line]
    assert row[-4:] == ["90%", "cudnn", "900.0", "0.90"]
    rows = [line.split() for line in text.splitlines()]
    assert ["float32", "1", "of", "2", "1.00e-03", "2e-06"] in rows
    assert ["float32,", "quantised", "pages", "1", "of", "1", "3.00e-06", "4e-06"] in rows
    assert "kernels: broken: error: no kernel" in text
    assert "decode: late: skipped: needs about 6 s, 0 s were left" in text
    assert "kernels-check: b: failed: far" in text
    assert text.index("KEYS 32") < text.index("as the launchers choose")


def test_the_summary_says_what_is_wrong(results: Results) -> None:
    summary = gpu_report.summary(results)
    assert summary["wrong"] == ["far"]
    assert summary["copy_bytes_per_s"] == 4.5e12
    assert summary["read_bytes_per_s"] is None


def test_the_plot_is_drawn_of_much_and_of_nothing(results: Results, tmp_path: Path) -> None:
    for parts in (PARTS, {}):
        results.parts = parts
        gpu_plot.draw(results, tmp_path / "plots" / "gpu.png")
        assert (tmp_path / "plots" / "gpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("chunk", [Chunk(0, 9), Chunk(5, 1), Chunk(5, 4), Chunk(20, 3)])
@pytest.mark.parametrize("bound", [1, 3, 7, 100])
def test_visible_pairs(chunk: Chunk, bound: int) -> None:
    positions = range(chunk.cached, chunk.cached + chunk.new)
    assert visible_pairs(chunk, bound) == sum(min(each + 1, bound) for each in positions)


@pytest.mark.parametrize("retrieval", [1.0, 0.5, 0.25])
def test_bytes_of_a_decode(retrieval: float) -> None:
    pages = Pages(16, GQA.head_dim, torch.bfloat16)
    labels = even_labels(3, GQA.num_kv_heads, retrieval)
    chunks = [Chunk(999, 1), Chunk(99, 1)]
    paged = build_paged(labels, DUO_ATTENTION, pages, chunks, torch.device("meta"))
    heads = GQA.num_kv_heads * retrieval
    keys = heads * (1000 + 100) + (GQA.num_kv_heads - heads) * (384 + 100)
    assert paged.read_bytes(1) == keys * 2 * GQA.head_dim * 2
    assert paged.attention_flops(1, GQA.group_size) == keys * 4 * GQA.head_dim * GQA.group_size
    paged.cache.check_integrity()


def test_layers_of_a_graph_outgrow_the_l2() -> None:
    kind = Kind()
    assert DecodeShape(GQA, 1 << 15, 1).num_layers(kind, 1.0) * (1 << 27) >= kind.least_bytes
    assert DecodeShape(GQA, 1 << 17, 8).num_layers(kind, 1.0) == 2


@pytest.mark.parametrize("shape", [LLAMA_3_8B, LLAMA_2_7B])
@pytest.mark.parametrize("retrieval", [1.0, 0.5, 0.25])
def test_random_labels_have_an_exact_number_of_retrieval_heads(
    shape: object, retrieval: float
) -> None:
    labels = random_labels(shape, retrieval)  # type: ignore[arg-type]
    assert sum(map(sum, labels)) == retrieval * sum(map(len, labels))


def test_weights_are_counted_as_published() -> None:
    assert LLAMA_3_8B.num_weights == pytest.approx(6.98e9, rel=1e-3)
    assert LLAMA_2_7B.num_weights == pytest.approx(6.48e9, rel=1e-3)
