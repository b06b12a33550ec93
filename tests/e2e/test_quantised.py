"""Engines whose pages are quantised answer like one whose pages are not, in fewer bytes."""

from collections.abc import Sequence

import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation import needle_accuracy
from headlong.server.engine.engine import Engine
from support.engines import build_engine, greedy, run

CONTEXT = 600
PROMPTS = 5


def build(kv_cache_dtype: str) -> Engine:
    return build_engine(
        MODEL_DIR,
        profile=str(MODEL_DIR / "profile.json"),
        kv_cache_dtype=kv_cache_dtype,
        dtype="bfloat16",
    )


def accuracy(engine: Engine) -> float:
    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        answers = run(engine, prompts, greedy(max_new_tokens))
        return [str(engine.tokenizer.decode(answer)) for answer in answers]

    return needle_accuracy(
        generate, engine.tokenizer, CONTEXT, PROMPTS, seed=5, max_new_tokens=12
    ).accuracy


@pytest.fixture(scope="module")
def plain() -> Engine:
    engine = build("auto")
    assert accuracy(engine) == 1.0
    return engine


@pytest.mark.parametrize(
    ("kv_cache_dtype", "formats"),
    [
        ("int8", {"retrieval": "int8", "streaming": "int8"}),
        ("fp8", {"retrieval": "fp8", "streaming": "fp8"}),
        ("retrieval=int4,streaming=bfloat16", {"retrieval": "int4", "streaming": None}),
    ],
)
def test_needles_are_found(
    plain: Engine, kv_cache_dtype: str, formats: dict[str, str | None]
) -> None:
    engine = build(kv_cache_dtype)
    pages = engine.arena.layout.pages
    assert formats == {
        group.kind: page.quantisation and page.quantisation.name
        for group, page in zip(engine.groups, pages, strict=True)
    }
    assert accuracy(engine) == 1.0
    # Scales and minima included: 32 elements of 16 bits become 8 or 4, and 16 or 32 bits.
    most = 0.55 if kv_cache_dtype in ("int8", "fp8") else 0.35
    shares = [
        page.page_bytes / full.page_bytes
        for page, full in zip(pages, plain.arena.layout.pages, strict=True)
        if page.quantisation is not None
    ]
    assert max(shares) <= most
