from dataclasses import replace

import pytest

from headlong.profiling.evaluation_variants import full_variant, swept
from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.evaluate import EngineAnswers, EngineCaches, without_compression
from headlong.server.engine.model import load_model
from headlong.server.errors import ContextLengthError
from support.engines import greedy, random_profile, random_prompts, run


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def profile(llama, tmp_path):
    return random_profile(llama, tmp_path / "labels.json", seed=1)


def test_answers_are_the_engines_and_bytes_those_of_its_blocks(llama, profile):
    engine = Engine(
        EngineConfig(
            model=str(llama),
            device="cpu",
            profile=str(profile),
            kv_cache_memory_bytes=4 << 20,
            max_num_seqs=3,
            max_num_batched_tokens=64,
        )
    )
    prompts = random_prompts((200, 17, 90, 5), 259)
    steps = []
    answers = EngineAnswers(engine)(prompts, 4, lambda done, total: steps.append((done, total)))
    assert [answer.kv_bytes for answer in answers] == [
        engine.plan.sequence_bytes(len(prompt)) for prompt in prompts
    ]
    # One token at most: a sequence has given its blocks back before anybody could look.
    assert EngineAnswers(engine)(prompts, 1)[0].kv_bytes == answers[0].kv_bytes
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ContextLengthError):
        EngineAnswers(engine)([prompts[0], [3] * 5000], 4)
    assert not engine.has_work
    assert engine.cache.owned_bytes == 0


def test_a_labelling_is_measured_by_itself(profile):
    plain = EngineConfig(model="m", device="cpu", block_size=8, max_num_seqs=3)
    compressed = replace(
        plain,
        profile=str(profile),
        sparsity=0.5,
        window_size=9,
        kv_cache_dtype="retrieval=int4",
        compensation="on",
        compensation_from_layer=0,
        retrieval_budget=64,
        selection_reuse_steps=2,
        selection_min_similarity=0.5,
    )
    assert without_compression(compressed) == plain


def test_each_labelling_has_its_own_cache(llama, profile):
    config = EngineConfig(
        model=str(llama), device="cpu", kv_cache_memory_bytes=8 << 20, max_model_len=300
    )
    model = load_model(config)
    identity = ModelIdentity.from_config(model.config)
    caches = EngineCaches(config, model)
    full = full_variant(identity)
    half, own = (
        swept("labels", identity, HeadProfile.load(profile), sparsities)[0]
        for sparsities in ([0.75], [])
    )
    (prompt,) = random_prompts((200,), 259)
    for variant, changes in ((full, {}), (half, {"sparsity": 0.75}), (own, {})):
        path = None if variant is full else str(profile)
        engine = Engine(
            EngineConfig(model=str(llama), device="cpu", profile=path, max_model_len=300,
                         kv_cache_memory_bytes=8 << 20, **changes),
            model,
        )  # fmt: skip
        (tokens,) = run(engine, [prompt], greedy(6))
        answer = caches.answering(variant)
        assert caches.answering(variant) is answer
        assert answer([prompt], 6) == EngineAnswers(engine)([prompt], 6)
        readers = caches.reading(full, variant)
        assert (readers[0] is readers[1]) == (variant is full)
        assert list(readers[1].logits(prompt))[-1][-1].argmax() == tokens[0]
        assert readers[1].kv_bytes == engine.plan.sequence_bytes(200)
