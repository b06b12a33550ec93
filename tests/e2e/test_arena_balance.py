"""Full requests beside compressed ones in slabs: blocks move, and no token changes."""

import random
from collections.abc import Callable
from pathlib import Path

from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest, KVPolicy
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

LENGTHS = [90, 14, 60, 30, 120, 8, 45, 75, 20, 100, 11, 50]


def serve(engine: Engine, requests: dict[str, EngineRequest]) -> dict[str, list[int]]:
    """Sends one request every other step, so that old and new ones lie between each other."""
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    waiting = list(requests.values())
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps % 2 == 0:
            engine.add_request(waiting.pop(0))
        steps += 1
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)
    return tokens


def test_a_mix_in_little_memory_says_what_each_says_alone(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1, sparsity=0.7))
    roomy = build_engine(folder, profile=profile, enable_prefix_caching=False, max_model_len=256)
    small = build_engine(
        folder,
        profile=profile,
        kv_cache_memory_bytes=roomy.plan.full_sequence_bytes(256) * 5 // 4,
        max_model_len=256,
        block_size=8,
    )
    assert small.plan.num_slabs > 0
    rng = random.Random(3)
    requests = {
        str(index): EngineRequest(
            str(index),
            prompt,
            greedy(rng.randint(5, 60)),
            kv_policy=KVPolicy(full=True) if index % 2 else None,
        )
        for index, prompt in enumerate(random_prompts(LENGTHS * 2, VOCAB_SIZE, seed=4))
    }
    served = serve(small, requests)
    assert small.cache._pools.num_moved > 0
    for name, request in requests.items():
        (expected,) = run(
            roomy, [request.prompt_token_ids], request.params, kv_policy=request.kv_policy
        )
        assert served[name] == expected, name


def test_a_share_that_is_fixed_is_the_groups_own(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))
    fixed = build_engine(folder, profile=profile, arena_balance="fixed")
    shared = build_engine(folder, profile=profile)
    assert fixed.plan.num_slabs == 0 < shared.plan.num_slabs
    assert any("blocks of 16  " in line for line in fixed.info().lines)
    assert any("slabs of" in line for line in shared.info().lines)
    prompts = random_prompts([40, 90], VOCAB_SIZE, seed=2)
    assert run(fixed, prompts) == run(shared, prompts)
