"""What the engine computes is what transformers computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headlong.server.engine import engine as engine_module
from support.engines import (
    SINK_SIZE,
    WINDOW_SIZE,
    build_engine,
    greedy,
    random_profile,
    random_prompts,
    run,
)
from support.oracle import MaskedOracle
from support.tiny_models import CONFIGS, VOCAB_SIZE

LENGTHS = (1, 15, 16, 17, 700)
MODELS = [*sorted(CONFIGS), "embedded"]


@pytest.mark.parametrize("name", MODELS)
def test_all_retrieval_equals_generate(name: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # eight of them: the five lengths, and three again with other tokens
    prompts = random_prompts((*LENGTHS, 16, 3, 90), VOCAB_SIZE)
    expected = [
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    engine = build_engine(folder)
    assert run(engine, prompts) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert run(engine, [prompt]) == [tokens]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("seed", "compensated_from"), [(0, None), (1, 0), (2, 1)])
def test_profile_logits_equal_masked_attention(
    name: str,
    seed: int,
    compensated_from: int | None,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_model(name)
    profile = random_profile(folder, tmp_path / "profile.json", seed)
    compensation: dict[str, object] = (
        {}
        if compensated_from is None
        else {"compensation": "on", "compensation_from_layer": compensated_from}
    )
    engine = build_engine(folder, profile=str(profile), max_num_batched_tokens=64, **compensation)
    seen: dict[str, list[torch.Tensor]] = {}

    def sample(logits: torch.Tensor, sequences: list, eos_token_ids: frozenset[int]) -> list:  # type: ignore[type-arg]
        for row, sequence in zip(logits, sequences, strict=True):
            seen.setdefault(sequence.request_id, []).append(row.clone())
        return sample_tokens(logits, sequences, eos_token_ids)

    sample_tokens = engine_module.sample
    monkeypatch.setattr(engine_module, "sample", sample)
    prompts = random_prompts((1, 17, 150), VOCAB_SIZE, seed)
    outputs = run(engine, prompts, greedy(8))
    labels = [
        [
            any((layer, head) in g.members for g in engine.groups if g.policy.keeps_all)
            for head in range(engine.model.geometry.num_kv_heads)
        ]
        for layer in range(engine.model.geometry.num_layers)
    ]
    oracle = MaskedOracle(folder, labels, SINK_SIZE, WINDOW_SIZE, compensated_from)
    for index, (prompt, tokens) in enumerate(zip(prompts, outputs, strict=True)):
        expected = oracle.logits(prompt + tokens)[len(prompt) - 1 : -1]
        assert (torch.stack(seen[str(index)]) - expected).abs().max() <= 1e-4
