"""What follows from part "context": ratios to bf16, to a shorter context, and to the link."""

from collections.abc import Iterable

from gpu_figures import Parts, Target, entries
from gpu_session import Entry

PART = "context"
LONG, LONGER = 128 * 1024, 1024 * 1024

OF_CELL = ("heads", "context", "batch", "form", "retrieval", "block_size", "budget", "reuse")

FORM_IDEAL = {"int4": 0.7, "int8": 0.85, "fp8": 0.85}
"""Share of the speed-up that fewer bytes allow, which unpacking must leave."""

GROWTH = 1.3
"""Most that a step under a budget may take at 1M tokens over one at 128k."""

LINK_SHARE = 0.8

QUEST_ATTENTION, QUEST_TOKEN = 7.03, 2.23
"""Published speed-ups over all pages, of attention and of a token (arXiv 2406.10774). Its model has
four times the KV heads, so that 32k of its tokens are as many bytes as 128k of these."""


def like(parts: Parts, entry: Entry, **changes: object) -> Entry | None:
    """The same layer's attention but for these fields."""
    wanted = {key: entry[key] for key in OF_CELL} | {"compensated": False} | changes
    return _first(entries(parts, PART, kind="attend", **wanted))


def over_plain(parts: Parts, entry: Entry) -> float | None:
    """Time of K and V as they are over that of a format, or of chosen pages."""
    plain = like(parts, entry, form=None, budget=None, reuse=1)
    return None if plain is None else plain["median_ms"] / entry["median_ms"]


def of_fewer_bytes(parts: Parts, entry: Entry) -> float | None:
    """The same as a share of what the bytes to read allow."""
    plain = like(parts, entry, form=None, budget=None, reuse=1)
    if plain is None:
        return None
    fewer: float = plain["read_bytes"] / entry["read_bytes"]
    return plain["median_ms"] / entry["median_ms"] / fewer


def over_long(parts: Parts, entry: Entry) -> float | None:
    """Time at 1M tokens over the same at 128k; None at any other context."""
    if entry["context"] != LONGER:
        return None
    shorter = like(parts, entry, context=LONG)
    return None if shorter is None else entry["median_ms"] / shorter["median_ms"]


def of_link(parts: Parts, entry: Entry) -> float | None:
    """A host tier's rate over the link's in the same direction."""
    link = _first(entries(parts, PART, kind="link", direction=entry["direction"]))
    return None if link is None else entry["bytes_per_s"] / link["bytes_per_s"]


def engine_over_plain(parts: Parts, entry: Entry) -> float | None:
    """Time of a token of the engine that keeps bf16 and reads all, over this one's."""
    plain = _first(entries(parts, PART, kind="engine", label="bf16", context=entry["context"]))
    return None if plain is None else plain["median_ms"] / entry["median_ms"]


def context_targets(parts: Parts) -> list[Target]:
    """What more context may cost."""
    return [*_attention_targets(parts), *_engine_targets(parts), *_tier_targets(parts)]


def _attention_targets(parts: Parts) -> list[Target]:
    found = [
        Target(
            f"decode attention, gqa 1 x 1024k, {form}: of the ideal",
            wanted,
            _least(
                of_fewer_bytes(parts, entry)
                for entry in entries(
                    parts, PART, kind="attend", form=form, context=LONGER, batch=1, retrieval=1.0,
                    budget=None,
                )
            ),
        )
        for form, wanted in FORM_IDEAL.items()
    ]  # fmt: skip
    chosen = entries(parts, PART, kind="attend", form=None, batch=1, retrieval=1.0, reuse=4)
    return [
        *found,
        Target(
            "attention of chosen pages: time at 128k over time at 1024k",
            1 / GROWTH,
            _least(_growth(like(parts, each, context=LONG), each) for each in chosen),
        ),
        Target(
            "attention of chosen pages at 128k: over all pages",
            QUEST_ATTENTION,
            _least(over_plain(parts, each) for each in chosen if each["context"] == LONG),
        ),
    ]


def _engine_targets(parts: Parts) -> list[Target]:
    chosen = [
        each for each in entries(parts, PART, kind="engine") if each["label"].startswith("budget")
    ]
    shorter = _first(each for each in chosen if each["context"] == LONG)
    return [
        Target(
            "engine, chosen pages: time at 128k over time at 1024k",
            1 / GROWTH,
            _least(_growth(shorter, each) for each in chosen),
        ),
        Target(
            "engine, chosen pages at 1024k: over all pages",
            QUEST_TOKEN,
            _least(engine_over_plain(parts, each) for each in chosen if each["context"] == LONGER),
        ),
    ]


def _tier_targets(parts: Parts) -> list[Target]:
    return [
        Target(
            f"host tier, slowest {direction} of blocks: of the link",
            LINK_SHARE,
            _least(
                of_link(parts, each)
                for each in entries(parts, PART, kind="tier", direction=direction)
            ),
        )
        for direction in ("store", "load", "both")
    ]


def _growth(shorter: Entry | None, entry: Entry) -> float | None:
    if shorter is None or entry["context"] != LONGER:
        return None
    ratio: float = shorter["median_ms"] / entry["median_ms"]
    return ratio


def _first(found: Iterable[Entry]) -> Entry | None:
    return next(iter(found), None)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
