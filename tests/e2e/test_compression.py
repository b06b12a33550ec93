"""Compression that works: the profile's heads carry the answers, and others do not."""

from collections.abc import Sequence
from pathlib import Path

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.evaluation import needle_accuracy
from headlong.profiling.head_profile import HeadProfile
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from support.engines import build_engine

CONTEXT = 1500
PROMPTS = 10
PROFILE = MODEL_DIR / "profile.json"


def accuracy(engine: Engine) -> float:
    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        texts = [""] * len(prompts)
        params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
        for index, prompt in enumerate(prompts):
            engine.add_request(EngineRequest(str(index), prompt, params))
        while engine.has_work:
            for output in engine.step():
                texts[int(output.request_id)] += output.text
        return texts

    return needle_accuracy(generate, engine.tokenizer, CONTEXT, PROMPTS, seed=5).accuracy


def build(profile: Path | None) -> Engine:
    return build_engine(
        MODEL_DIR,
        profile=None if profile is None else str(profile),
        kv_cache_memory_bytes=128 << 20,
        max_num_batched_tokens=1024,
    )


def test_the_profile_keeps_the_answers_and_its_opposite_loses_them(tmp_path: Path) -> None:
    profile = HeadProfile.load(PROFILE)
    assert profile.sparsity is not None
    assert profile.sparsity >= 0.5
    scores = tuple(tuple(-score for score in row) for row in profile.scores)
    opposite = tmp_path / "opposite.json"
    profile.model_copy(update={"scores": scores}).save(opposite)
    full = accuracy(build(None))
    assert full >= 0.9
    assert accuracy(build(PROFILE)) >= 0.98 * full
    assert accuracy(build(opposite)) < 0.3


def test_bytes_owned_follow_the_policy() -> None:
    """Read off the block tables: a long prompt's streaming heads own a window, no more."""
    engine, full = build(PROFILE), build(None)
    prompt = [7] * 1000
    owned: list[int] = []
    for each in (engine, full):
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        each.add_request(EngineRequest("r", prompt, params))
        while not any(output.token_ids for output in each.step()):
            pass
        owned.append(each.cache.owned_bytes)
        assert owned[-1] == each.plan.sequence_bytes(1000)
        each.abort("r")
    retrieval = sum(len(group.members) for group in engine.groups if group.policy.keeps_all)
    heads = engine.model.geometry.num_layers * engine.model.geometry.num_kv_heads
    windows = (heads - retrieval) / heads * (16 + 128 + 2 * 16) / 1000
    assert owned[0] / owned[1] <= retrieval / heads + windows
