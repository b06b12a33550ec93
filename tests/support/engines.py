"""Small engines, and what comes out of them."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from transformers import AutoConfig

from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.follower_link import OnDeath
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams

SINK_SIZE = 5
WINDOW_SIZE = 21


def build_engine(
    folder: Path, on_rank_death: OnDeath | None = None, /, **changes: object
) -> Engine:
    settings: dict[str, object] = {
        "device": "cpu",
        "kv_cache_memory_bytes": 16 << 20,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    }
    config = EngineConfig(model=str(folder), **(settings | changes))  # type: ignore[arg-type]
    return Engine(config, on_rank_death=on_rank_death)


def engine_maker(folder: Path, scratch: Path, **settings: object) -> Callable[..., Engine]:
    """What builds engines of these settings and a random profile, with a test's changes."""
    profile = random_profile(folder, scratch / "p.json", seed=1)

    def make(**changes: object) -> Engine:
        return build_engine(folder, **({"profile": str(profile)} | settings | changes))

    return make


def crowded_engines(
    folder: Path,
    profile: Path,
    max_model_len: int,
    features: Mapping[str, object] = MappingProxyType({}),
    **changes: object,
) -> tuple[Engine, Engine]:
    """One with room for everything, without a prefix cache, and one that has to preempt.

    Both have the `features`, which decide what a request says.
    """
    roomy = build_engine(folder, profile=str(profile), enable_prefix_caching=False, **features)
    small = build_engine(
        folder,
        profile=str(profile),
        kv_cache_memory_bytes=roomy.plan.full_sequence_bytes(max_model_len) * 2,
        max_model_len=max_model_len,
        kv_policy_tokens=max_model_len,
        **{"block_size": 8, **features, **changes},
    )
    return roomy, small


def random_profile(folder: Path, target: Path, seed: int, sparsity: float = 0.5) -> Path:
    """Write a profile of random scores for a checkpoint."""
    identity = ModelIdentity.from_config(AutoConfig.from_pretrained(folder))
    rng = random.Random(seed)
    scores = tuple(
        tuple(rng.random() for _ in range(identity.num_kv_heads))
        for _ in range(identity.num_layers)
    )
    profile = HeadProfile(
        model=identity,
        method="random",
        scores=scores,
        sink_size=SINK_SIZE,
        window_size=WINDOW_SIZE,
        sparsity=sparsity,
    )
    profile.save(target)
    return target


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **options: object,
) -> list[list[int]]:
    """Serve prompts together; the tokens of each. Leaves the cache empty, and checks that.

    `options` are those of `EngineRequest`.
    """
    chosen = params if isinstance(params, Sequence) else [params or greedy()] * len(prompts)
    tokens: Mapping[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, (prompt, each) in enumerate(zip(prompts, chosen, strict=True)):
        engine.add_request(EngineRequest(str(index), prompt, each, **options))  # type: ignore[arg-type]
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].extend(output.token_ids)
        engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    return list(tokens.values())
