"""Tables for the terminal, a plot, and the line of JSON that sums up."""

import math
from collections.abc import Callable

from gpu_figures import Parts, Target, ceiling, entries, of_ideal, peers, speed_up, targets
from gpu_figures_context import context_targets
from gpu_layers import short
from gpu_report_context import append_rows, choice_rows, engine_rows, format_rows, tier_rows
from gpu_rows import GIB, Row, aligned, number, over_best, percent, times
from gpu_session import WHOLE_PART, Entry, Results, code_digest

WRONG = ("failed", "error")


def lines(results: Results) -> list[str]:
    """All tables."""
    parts = results.parts
    found = [f"{results.machine['name']}, torch {results.machine['torch']}"]
    for title, table in TABLES:
        rows = table(parts)
        if rows:
            found += ["", title, *aligned(rows)]
    return [*found, *_notes(parts)]


def summary(results: Results) -> dict[str, object]:
    """Key figures."""
    parts = results.parts
    checked = parts.get("kernels-check", {}).values()
    moved = parts.get("context", {}).values()
    broken = [name for name, found in parts.items() if WHOLE_PART in found]
    return {
        "benchmark": "gpu",
        "machine": results.machine,
        "kernels_checked": sum(entry["status"] == "ok" for entry in checked),
        "kernels_not_checked": sum(entry["status"] not in ("ok", *WRONG) for entry in checked),
        "wrong": broken
        + [entry["why"] for entry in checked if entry["status"] in WRONG]
        + [entry["why"] for entry in moved if entry["status"] == "failed"],
        "copy_bytes_per_s": ceiling(parts, "copy"),
        "read_bytes_per_s": ceiling(parts, "read"),
        "matmul_flops_per_s": ceiling(parts, "matmul"),
        "targets": {
            each.name: {"wanted": each.wanted, "measured": round(each.measured, 3)}
            for each in _all_targets(parts)
            if each.measured is not None
        },
        "results": str(results.path),
    }


def _check_rows(parts: Parts) -> list[Row]:
    found: dict[tuple[str, bool], list[Entry]] = {}
    for entry in parts.get("kernels-check", {}).values():
        if "dtype" in entry:
            found.setdefault((entry["dtype"], bool(entry.get("formats"))), []).append(entry)
    rows: list[Row] = []
    for (dtype, quantised), cases in sorted(found.items()):
        good = sum(entry["status"] == "ok" for entry in cases)
        worst = max((entry["error"] for entry in cases), key=lambda e: (math.isnan(e), e))
        shown = f"{dtype}, quantised pages" if quantised else dtype
        tolerance = cases[0]["tolerance"]
        rows.append((shown, f"{good} of {len(cases)}", f"{worst:.2e}", f"{tolerance:.0e}"))
    return [("dtype", "passed", "worst error", "tolerance"), *rows] if rows else []


def _ceiling_rows(parts: Parts) -> list[Row]:
    rows: list[Row] = []
    for kind, unit in (("copy", "TB/s"), ("read", "TB/s"), ("matmul", "TFLOP/s")):
        best = ceiling(parts, kind)
        if best is not None:
            rows.append((kind, f"{best / 1e12:.2f} {unit}"))
    return rows


def _decode_kernel_rows(parts: Parts) -> list[Row]:
    head = ("heads", "batch x context", "block", "retrieval", "us", "TB/s", "of copy", "of read",
            "of ideal", "best of torch", "us", "torch/ours")  # fmt: skip
    rows: list[Row] = []
    for entry in entries(parts, "kernels", kind="decode"):
        if "peer" in entry:
            continue
        rate, share = entry["bytes_per_s"], entry["retrieval"]
        best = next(iter(peers(parts, entry)), None) if share == 1.0 else None
        rows.append(
            (
                entry["heads"],
                f"{entry['batch']} x {short(entry['context'])}",
                str(entry["block_size"]),
                f"{share:.0%}",
                f"{1e3 * entry['median_ms']:.1f}",
                f"{rate / 1e12:.2f}",
                over_best(rate, ceiling(parts, "copy")),
                over_best(rate, ceiling(parts, "read")),
                "" if share == 1.0 else percent(of_ideal(parts, entry)),
                *_peer_columns(entry, best, 1e3),
            )
        )
    return [head, *rows] if rows else []


def _prefill_kernel_rows(parts: Parts) -> list[Row]:
    head = ("heads", "chunk of context", "retrieval", "ms", "TFLOP/s", "of matmul", "faster",
            "best of torch", "ms", "torch/ours")  # fmt: skip
    rows: list[Row] = []
    for entry in entries(parts, "kernels", kind="prefill"):
        if "peer" in entry:
            continue
        rate, share = entry["flops_per_s"], entry["retrieval"]
        best = next(iter(peers(parts, entry)), None) if share == 1.0 else None
        rows.append(
            (
                entry["heads"],
                f"{short(entry['chunk'])} of {short(entry['context'])}",
                f"{share:.0%}",
                f"{entry['median_ms']:.2f}",
                f"{rate / 1e12:.0f}",
                over_best(rate, ceiling(parts, "matmul")),
                times(speed_up(parts, "kernels", entry, "median_ms")),
                *_peer_columns(entry, best, 1.0),
            )
        )
    return [head, *rows] if rows else []


def _peer_rows(parts: Parts) -> list[Row]:
    rows: list[Row] = []
    for name, entry in parts.get("kernels", {}).items():
        if "peer" in entry:
            rows.append((name, f"{entry['median_ms']:.3f} ms", entry.get("method", "launches")))
    return rows


def _engine_decode_rows(parts: Parts) -> list[Row]:
    head = ("model", "context", "retrieval", "graphs ms", "faster", "eager ms", "peak GiB",
            "cache GiB")  # fmt: skip
    rows: list[Row] = []
    for entry in entries(parts, "decode", eager=False):
        same = {key: entry[key] for key in ("model", "context", "retrieval")}
        eager = next(iter(entries(parts, "decode", **same, eager=True)), None)
        rows.append(
            (
                entry["model"],
                short(entry["context"]),
                f"{entry['retrieval']:.0%}",
                f"{entry['median_ms']:.2f}" + ("" if entry["cuda_graphs"] else " (no graphs)"),
                times(speed_up(parts, "decode", entry, "median_ms")),
                "" if eager is None else f"{eager['median_ms']:.2f}",
                f"{entry['peak_bytes'] / GIB:.1f}",
                f"{entry['cache_bytes'] / GIB:.1f}",
            )
        )
    return [head, *rows] if rows else []


def _engine_prefill_rows(parts: Parts) -> list[Row]:
    head = ("model", "tokens", "retrieval", "s", "tokens/s", "faster", "peak GiB")
    rows: list[Row] = [
        (
            entry["model"],
            short(entry["tokens"]),
            f"{entry['retrieval']:.0%}",
            f"{entry['total_s']:.2f}",
            f"{entry['tokens_per_s']:.0f}",
            times(speed_up(parts, "prefill", entry, "total_s")),
            f"{entry['peak_bytes'] / GIB:.1f}",
        )
        for entry in entries(parts, "prefill")
    ]
    return [head, *rows] if rows else []


def _tuning_rows(parts: Parts) -> list[Row]:
    """The ten fastest forms of each kernel, and the one that the launchers choose."""
    rows: list[Row] = []
    for work in dict.fromkeys(entry["work"] for entry in entries(parts, "tuning")):
        ranked = sorted(entries(parts, "tuning", work=work), key=lambda each: each["median_ms"])
        for rank, entry in enumerate(ranked, start=1):
            if rank <= 10 or not entry["change"]:
                shown = " ".join(f"{key} {value}" for key, value in entry["change"].items())
                shown = shown or "as the launchers choose"
                rows.append((f"{rank}.", work, f"{entry['median_ms']:.4f} ms", shown))
    return rows


def _all_targets(parts: Parts) -> list[Target]:
    return targets(parts) + context_targets(parts)


def _target_rows(parts: Parts) -> list[Row]:
    rows = [
        (each.name, f"{each.wanted:.2f}", number(each.measured), each.verdict)
        for each in _all_targets(parts)
        if each.measured is not None
    ]
    return [("figure", "wanted", "measured", ""), *rows] if rows else []


TABLES: tuple[tuple[str, Callable[[Parts], list[Row]]], ...] = (
    ("kernels against the float64 reference", _check_rows),
    ("other forms of the kernels", _tuning_rows),
    ("torch's attention", _peer_rows),
    ("ceilings", _ceiling_rows),
    ("decode attention of one layer", _decode_kernel_rows),
    ("prefill attention of one layer", _prefill_kernel_rows),
    ("more context: decode attention of one layer, all pages", format_rows),
    ("more context: decode attention of one layer, chosen pages", choice_rows),
    ("more context: append of one layer", append_rows),
    ("more context: blocks to the host and back", tier_rows),
    ("more context: engine, decode of one sequence", engine_rows),
    ("engine, decode of one sequence", _engine_decode_rows),
    ("engine, prefill of one prompt", _engine_prefill_rows),
    ("targets", _target_rows),
)


def _notes(parts: Parts) -> list[str]:
    """What there is no figure for, and figures of code that has changed since."""
    now = code_digest()
    missing: list[str] = []
    stale: list[str] = []
    for part, found in parts.items():
        missing += [
            f"  {part}: {name}: {entry['status']}: {entry.get('why', '')}"
            for name, entry in found.items()
            if entry["status"] != "ok"
        ]
        if any(entry.get("code", now) != now for entry in found.values()):
            stale.append(part)
    found_notes = ["", "without a figure", *missing] if missing else []
    if stale:
        found_notes += ["", f"partly measured before the code was changed: {', '.join(stale)}"]
    return found_notes


def _peer_columns(entry: Entry, best: Entry | None, scale: float) -> Row:
    if best is None:
        return ("", "", "")
    ratio = best["median_ms"] / entry["median_ms"]
    return best["peer"], f"{scale * best['median_ms']:.1f}", f"{ratio:.2f}"
