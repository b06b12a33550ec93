from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headlong.cache.sequence_cache import SequenceCache
from headlong.profiling.evaluation_tokens import token_metrics
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.model import load_model
from headlong.server.engine.token_scores import PagedForward, open_paged_forward
from headlong.server.errors import ConfigError, ContextLengthError, InvalidRequestError
from support.engines import SINK_SIZE, WINDOW_SIZE, random_profile, random_prompts
from support.oracle import MaskedOracle
from support.tiny_models import VOCAB_SIZE

LENGTHS = (1, 16, 150)


def open_forward(folder: Path, profile: Path | None = None, chunk_tokens: int = 48) -> PagedForward:
    config = EngineConfig(
        model=str(folder), device="cpu", profile=None if profile is None else str(profile)
    )
    return open_paged_forward(config, load_model(config), 160, chunk_tokens)


def all_logits(forward: PagedForward, tokens: list[int]) -> torch.Tensor:
    return torch.cat(list(forward.logits(tokens)))


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt_oss", "embedded"])
def test_a_full_cache_gives_the_logits_of_transformers(
    name: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    forward = open_forward(folder)
    for tokens in random_prompts(LENGTHS, VOCAB_SIZE):
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0]
        assert (all_logits(forward, tokens) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt_oss", "embedded"])
@pytest.mark.parametrize("chunk_tokens", [1, 48, 1000])
def test_a_profile_gives_the_logits_of_masked_attention(
    name: str, chunk_tokens: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(name)
    path = random_profile(folder, tmp_path / "profile.json", seed=1)
    from headlong.profiling.head_profile import HeadProfile

    oracle = MaskedOracle(folder, HeadProfile.load(path).labels(), SINK_SIZE, WINDOW_SIZE)
    forward = open_forward(folder, path, chunk_tokens)
    for tokens in random_prompts(LENGTHS, VOCAB_SIZE):
        expected = oracle.logits(tokens)
        assert (all_logits(forward, tokens) - expected).abs().max() <= 1e-4


def test_chunks_are_as_long_as_asked(tiny_model: Callable[[str], Path]) -> None:
    forward = open_forward(tiny_model("llama"), chunk_tokens=48)
    (tokens,) = random_prompts((100,), VOCAB_SIZE)
    assert [len(chunk) for chunk in forward.logits(tokens)] == [48, 48, 4]
    assert all(chunk.dtype == torch.float32 for chunk in forward.logits(tokens))


def test_blocks_are_given_back_and_their_bytes_noted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    (tokens,) = random_prompts((150,), VOCAB_SIZE)
    held = []
    for profile in (None, random_profile(folder, tmp_path / "profile.json", seed=1)):
        forward = open_forward(folder, profile)
        cache = forward._cache
        assert forward.kv_bytes == 0
        all_logits(forward, tokens)
        cache.check_integrity()
        assert cache.owned_bytes == 0
        held.append(forward.kv_bytes)
        # Leaving early gives everything back too.
        chunks = forward.logits(tokens)
        next(chunks)
        assert cache.owned_bytes > 0
        chunks.close()
        assert cache.owned_bytes == 0
        cache.check_integrity()
    full, compressed = held
    # 10 blocks of 16 tokens; 3 layers of 2 KV heads with 16 elements of K and of V.
    assert full == 10 * 16 * 3 * 2 * 16 * 2 * 4
    assert compressed < full


def test_a_cache_does_not_diverge_from_itself(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    texts = random_prompts((40, 150), VOCAB_SIZE)
    full, again = open_forward(folder), open_forward(folder)
    same = token_metrics(full, again, texts)
    assert (same.kl_nats, same.top1_agreement) == (0.0, 1.0)
    compressed = open_forward(folder, random_profile(folder, tmp_path / "profile.json", seed=1))
    other = token_metrics(full, compressed, texts)
    assert other.kl_nats > 1e-3
    assert other.top1_agreement < 1.0
    # The first tokens see the same keys with both caches.
    short = [text[:20] for text in texts]
    assert token_metrics(full, compressed, short).kl_nats <= 1e-9


@pytest.mark.parametrize("broken_side", [0, 1])
def test_an_error_holds_no_blocks_while_it_is_handled(
    broken_side: int, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    sides = [open_forward(folder), open_forward(folder)]
    whole = sides[broken_side]._chunk
    owned: list[int] = []

    def broken(sequence: SequenceCache, *rest: object) -> torch.Tensor:
        if sequence.num_tokens:
            owned.extend(side._cache.owned_bytes for side in sides)
            raise RuntimeError("the second chunk")
        return whole(sequence, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sides[broken_side], "_chunk", broken)
    try:
        token_metrics(sides[0], sides[1], random_prompts((100,), VOCAB_SIZE))
    except RuntimeError:
        # The traceback is alive here, and all frames with it.
        assert [side._cache.owned_bytes for side in sides] == [0, 0]
    assert len(owned) == 2
    assert min(owned) > 0


def test_what_cannot_be_run_is_refused(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    forward = open_forward(folder)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        all_logits(forward, [])
    with pytest.raises(InvalidRequestError, match="not in 0 to 319"):
        all_logits(forward, [3, 320])
    with pytest.raises(ContextLengthError, match="has 161 tokens; the longest is 160"):
        all_logits(forward, [3] * 161)
    config = EngineConfig(model=str(folder), device="cpu")
    model = load_model(config)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        PagedForward(forward._runner, forward._cache, 160, 0)
    small = replace(config, kv_cache_memory_bytes=4096)
    with pytest.raises(ConfigError, match="4096 bytes"):
        open_paged_forward(small, model, 160)
