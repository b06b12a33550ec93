"""Tables of part "context"."""

from gpu_figures import Parts, ceiling, entries
from gpu_figures_context import (
    PART,
    engine_over_plain,
    like,
    of_fewer_bytes,
    of_link,
    over_long,
    over_plain,
)
from gpu_layers import short
from gpu_rows import GIB, Row, over_best, percent, times
from gpu_session import Entry


def format_rows(parts: Parts) -> list[Row]:
    """A layer's attention over all pages, by format."""
    head = ("batch x context", "K and V", "retrieval", "block", "us", "MiB read", "TB/s",
            "of read", "faster", "of ideal")  # fmt: skip
    rows: list[Row] = [
        (
            *_of_layer(entry),
            _time(entry),
            f"{entry['read_bytes'] / (1 << 20):.1f}",
            f"{entry['bytes_per_s'] / 1e12:.2f}",
            over_best(entry["bytes_per_s"], ceiling(parts, "read")),
            "" if entry["form"] is None else times(over_plain(parts, entry)),
            "" if entry["form"] is None else percent(of_fewer_bytes(parts, entry)),
        )
        for entry in entries(parts, PART, kind="attend", budget=None)
    ]
    return [head, *rows] if rows else []


def choice_rows(parts: Parts) -> list[Row]:
    """A layer's attention over chosen pages, beside all pages of K and V as they are."""
    head = ("batch x context", "K and V", "retrieval", "block", "budget", "reuse", "us",
            "MiB read", "all pages us", "faster", "over 128k")  # fmt: skip
    rows: list[Row] = []
    for entry in entries(parts, PART, kind="attend"):
        if entry["budget"] is None:
            continue
        dense = like(parts, entry, form=None, budget=None, reuse=1)
        rows.append(
            (
                *_of_layer(entry),
                str(entry["budget"]),
                str(entry["reuse"]),
                _time(entry),
                f"{entry['read_bytes'] / (1 << 20):.1f}",
                "" if dense is None else _time(dense),
                times(over_plain(parts, entry)),
                times(over_long(parts, entry)),
            )
        )
    return [head, *rows] if rows else []


def append_rows(parts: Parts) -> list[Row]:
    """A layer's append, by what pages say of their K and V."""
    head = ("batch x context", "K and V", "retrieval", "block", "bounds", "us")
    rows: list[Row] = [
        (
            *_of_layer(entry),
            "yes" if entry["budget"] else "no",
            _time(entry),
        )
        for entry in entries(parts, PART, kind="append")
    ]
    return [head, *rows] if rows else []


def engine_rows(parts: Parts) -> list[Row]:
    """The engine's steps, each feature alone and together."""
    head = ("model", "context", "what", "retrieval", "ms a token", "faster", "peak GiB",
            "cache GiB")  # fmt: skip
    rows: list[Row] = [
        (
            entry["model"],
            short(entry["context"]),
            entry["label"],
            f"{entry['retrieval']:.0%}",
            f"{entry['median_ms']:.2f}" + ("" if entry["cuda_graphs"] else " (no graphs)"),
            times(engine_over_plain(parts, entry)),
            f"{entry['peak_bytes'] / GIB:.1f}",
            f"{entry['cache_bytes'] / GIB:.1f}",
        )
        for entry in entries(parts, PART, kind="engine")
    ]
    return [head, *rows] if rows else []


def tier_rows(parts: Parts) -> list[Row]:
    """Blocks to the host and back, beside plain copies."""
    head = ("what", "KiB a block", "direction", "GB/s", "of the link")
    rows: list[Row] = [
        ("link", "", entry["direction"], f"{entry['bytes_per_s'] / 1e9:.1f}", "")
        for entry in entries(parts, PART, kind="link")
    ]
    rows += [
        (
            f"blocks of {entry['block_size']}, {_format(entry)}",
            f"{entry['block_bytes'] / 1024:.0f}",
            entry["direction"],
            f"{entry['bytes_per_s'] / 1e9:.1f}",
            percent(of_link(parts, entry)),
        )
        for entry in entries(parts, PART, kind="tier")
    ]
    return [head, *rows] if rows else []


def _of_layer(entry: Entry) -> Row:
    return (
        f"{entry['batch']} x {short(entry['context'])}",
        _format(entry),
        f"{entry['retrieval']:.0%}",
        str(entry["block_size"]),
    )


def _time(entry: Entry) -> str:
    graphs = "" if entry["method"] == "graph" else " (no graphs)"
    return f"{1e3 * entry['median_ms']:.1f}{graphs}"


def _format(entry: Entry) -> str:
    extra = ", compensated" if entry.get("compensated") else ""
    return (entry["form"] or entry["dtype"]) + extra
