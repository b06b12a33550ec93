"""A given completion scored as the engine would have decoded it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headlong.server.engine.decode_scores import score_decodes
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.errors import ContextLengthError, InvalidRequestError
from support.engines import build_engine, random_profile, random_prompts
from support.tiny_models import VOCAB_SIZE

PROMPT, CONTINUATION = random_prompts((150, 40), VOCAB_SIZE, seed=8)


@pytest.fixture
def build(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Engine]:
    folder = tiny_model("qwen3")
    profile = str(random_profile(folder, tmp_path / "p.json", seed=1))

    def make(**changes: object) -> Engine:
        settings: dict[str, object] = {"profile": profile, "block_size": 8, "max_model_len": 200}
        return build_engine(folder, **(settings | changes))

    return make


def served(engine: Engine, num_tokens: int) -> list[tuple[int, float]]:
    """Sampled tokens with their log probabilities."""
    params = SamplingParams(max_tokens=num_tokens, seed=1, logprobs=0, ignore_eos=True)
    engine.add_request(EngineRequest("r", PROMPT, params))
    found: list[tuple[int, float]] = []
    while engine.has_work:
        for output in engine.step():
            found += [(each.chosen.token_id, each.chosen.logprob) for each in output.logprobs or ()]
    return found


@pytest.mark.parametrize(
    "budget", [{}, {"retrieval_budget": 64}, {"retrieval_budget": 64, "selection_reuse_steps": 4}]
)
def test_they_are_what_was_served(build: Callable[..., Engine], budget: dict[str, int]) -> None:
    engine = build(**budget)
    tokens, logprobs = zip(*served(engine, 40), strict=True)
    scores = score_decodes(engine, PROMPT, tokens)
    assert scores.shape == (40, VOCAB_SIZE)
    assert scores.dtype == torch.float32
    found = torch.log_softmax(scores, dim=-1)[torch.arange(40), torch.tensor(tokens)]
    assert (found - torch.tensor(logprobs)).abs().max() <= 1e-4
    engine.cache.check_integrity()
    assert engine.cache.owned_blocks == (0,) * len(engine.groups)


def test_a_budget_shows_from_the_first_token_decoded_under_it(
    build: Callable[..., Engine],
) -> None:
    dense = score_decodes(build(), PROMPT, CONTINUATION)
    chosen = score_decodes(build(retrieval_budget=64), PROMPT, CONTINUATION)
    difference = (dense - chosen).abs().amax(dim=1)
    # The last token of the prompt says the first row, and reads everything.
    assert difference[0] <= 1e-4
    assert difference[1:].min() > 1e-3
    covered = score_decodes(build(retrieval_budget=160), PROMPT, CONTINUATION)
    difference = (dense - covered).abs().amax(dim=1)
    assert difference[:11].max() <= 1e-4
    assert difference[11:].max() > 1e-3


def test_what_cannot_be_scored_is_refused(build: Callable[..., Engine]) -> None:
    engine = build()
    for prompt, continuation in (([], [5]), ([5], [])):
        with pytest.raises(InvalidRequestError, match="need a token each"):
            score_decodes(engine, prompt, continuation)
    with pytest.raises(InvalidRequestError, match="not in 0 to 319"):
        score_decodes(engine, [5], [320, 5])
    with pytest.raises(ContextLengthError, match="has 201 tokens; the longest is 200"):
        score_decodes(engine, [5] * 101, [5] * 101)
    engine.add_request(EngineRequest("r", PROMPT, SamplingParams(max_tokens=1)))
    with pytest.raises(ValueError, match="requests run"):
        score_decodes(engine, PROMPT, CONTINUATION)
