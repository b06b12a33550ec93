import random

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from headlong.profiling import retrieval_head
from headlong.profiling.errors import ProfilingError, ScoringError, UnsupportedModelError
from headlong.profiling.needles import NeedlePrompt
from headlong.profiling.progress import no_progress
from headlong.profiling.prompts import EncodedPrompt
from headlong.profiling.retrieval_head import RetrievalHeadScorer, copied_fraction

SMALL = RetrievalHeadScorer(
    max_context_tokens=100,
    num_needles=1,
    num_lengths=1,
    num_depths=3,
    num_distractors=0,
    max_new_tokens=40,
    chunk_tokens=30,
)


@pytest.fixture
def always_recalled(monkeypatch: pytest.MonkeyPatch) -> list[NeedlePrompt]:
    """Random weights answer nothing; here every answer passes, and the prompts are noted."""
    seen: list[NeedlePrompt] = []
    build = retrieval_head.build_needle_prompt

    def noting(*args: object) -> NeedlePrompt:
        seen.append(build(*args))
        return seen[-1]

    monkeypatch.setattr(retrieval_head, "build_needle_prompt", noting)
    monkeypatch.setattr(retrieval_head, "is_answered", lambda fact, text: True)
    return seen


def prefer_needle_bytes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes the model generate, in an order that the context decides, what needles consist of."""
    wanted = tokenizer(" easrThotn0123456789.")["input_ids"]
    with torch.no_grad():
        kept = model.lm_head.weight[wanted].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[wanted] = kept


@torch.no_grad()
def scores_by_eager(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[NeedlePrompt],
    max_new_tokens: int,
) -> list[list[float]]:
    """The paper's score in plain loops over complete attention matrices."""
    model.set_attn_implementation("eager")
    num_layers, num_heads = 2, 4
    totals = [[0.0] * num_heads for _ in range(num_layers)]
    for prompt in prompts:
        text = f"<u>{prompt.chat[0]['content']}\n<a>"
        ids = tokenizer(text)["input_ids"]
        # One token a byte, except the special token at the front.
        start = 1 + prompt.haystack.index(prompt.fact.statement)
        needle = range(start, start + len(prompt.fact.statement))
        assert tokenizer.decode(ids[needle.start : needle.stop]) == prompt.fact.statement
        prompt_ids = list(ids)
        copied: dict[tuple[int, int], set[int]] = {}
        generated: list[int] = []
        for _ in range(max_new_tokens):
            output = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
            token = int(output.logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            for layer in range(num_layers):
                for head in range(num_heads):
                    place = int(output.attentions[layer][0, head, -1].argmax())
                    if place in needle and prompt_ids[place] == token:
                        copied.setdefault((layer, head), set()).add(place)
            ids.append(token)
            generated.append(token)
            if "\n" in tokenizer.decode(generated).lstrip():
                break
        for (layer, head), places in copied.items():
            totals[layer][head] += len(places) / len(needle)
    return [[total / len(prompts) for total in row] for row in totals]


def test_equals_eager_statement(
    any_model: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
) -> None:
    prefer_needle_bytes(any_model, byte_tokenizer)
    measured = SMALL.score_query_heads(any_model, byte_tokenizer, no_progress)
    assert len(always_recalled) == 3
    expected = scores_by_eager(any_model, byte_tokenizer, always_recalled, SMALL.max_new_tokens)
    assert max(max(row) for row in expected) > 0
    for row, expected_row in zip(measured.scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)


@pytest.mark.parametrize("fold", ["max", "mean"])
def test_folds_query_heads(
    qwen3: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
    fold: str,
) -> None:
    prefer_needle_bytes(qwen3, byte_tokenizer)
    scorer = SMALL.model_copy(update={"fold": fold})
    queries = scorer.score_query_heads(qwen3, byte_tokenizer, no_progress).scores
    folded = scorer.score(qwen3, byte_tokenizer, no_progress).scores
    for row, (a, b, c, d) in zip(folded, queries, strict=True):
        expected = (max(a, b), max(c, d)) if fold == "max" else ((a + b) / 2, (c + d) / 2)
        assert row == pytest.approx(expected)
    assert max(max(row) for row in queries) > 0


def test_averages_over_recalled_runs_only(
    qwen3: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefer_needle_bytes(qwen3, byte_tokenizer)
    answers = iter([False, True, False])
    monkeypatch.setattr(retrieval_head, "is_answered", lambda fact, text: next(answers))
    measured = SMALL.score_query_heads(qwen3, byte_tokenizer, no_progress)
    expected = scores_by_eager(qwen3, byte_tokenizer, always_recalled[1:2], SMALL.max_new_tokens)
    assert [list(row) for row in measured.scores] == [pytest.approx(row) for row in expected]
    assert max(max(row) for row in expected) > 0
    assert measured.details == {
        "chat": True,
        "context_lengths": [100],
        "num_runs": 3,
        "num_recalled_runs": 1,
    }


def test_does_not_depend_on_the_chunk_size(
    qwen3: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
) -> None:
    prefer_needle_bytes(qwen3, byte_tokenizer)
    whole = SMALL.model_copy(update={"chunk_tokens": 1000})
    assert SMALL.score(qwen3, byte_tokenizer, no_progress) == whole.score(
        qwen3, byte_tokenizer, no_progress
    )


def test_says_how_far_it_is(
    qwen3: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
) -> None:
    said: list[tuple[int, int]] = []
    scorer = SMALL.model_copy(
        update={"max_context_tokens": 200, "num_needles": 2, "num_lengths": 2, "num_depths": 1}
    )
    scorer.score(qwen3, byte_tokenizer, lambda done, total: said.append((done, total)))
    assert said == [(i, 4) for i in range(5)]


def test_copied_fraction() -> None:
    encoded = EncodedPrompt(token_ids=(9, 7, 8, 7, 9), needle_positions=(1, 2, 3))
    generated = [7, 8, 8, 5]
    head_a = [1, 2, 2, 0]  # copies 7 and 8, and 8 once more
    head_b = [3, 4, 1, 2]  # copies 7; looks outside; looks at 7 as 8 is generated
    attended = torch.tensor([[[a, b]] for a, b in zip(head_a, head_b, strict=True)])
    fraction = copied_fraction(encoded, generated, attended)
    torch.testing.assert_close(fraction, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))


def test_random_runs_score_between_0_and_1() -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = tuple(rng.randrange(4) for _ in range(12))
        generated = [rng.randrange(4) for _ in range(9)]
        attended = torch.tensor([[[rng.randrange(21)] for _ in range(3)] for _ in generated])
        fraction = copied_fraction(EncodedPrompt(ids, (4, 5, 6)), generated, attended)
        assert fraction.shape == (3, 1)
        assert bool(((fraction >= 0) & (fraction <= 1)).all())


def test_no_recalled_run_is_an_error(
    qwen3: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ScoringError, match="recalled the needle in none of 3 runs of 100 to 100"):
        SMALL.score(qwen3, byte_tokenizer, no_progress)
    assert qwen3.config._attn_implementation == "sdpa"


def test_stopping_at_once_is_not_recalled(
    qwen3: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        qwen3.lm_head.weight.zero_()  # all logits equal: the first token, which is eos
    with pytest.raises(ScoringError, match="in none of 3 runs"):
        SMALL.score(qwen3, byte_tokenizer, no_progress)


def test_completion_needles_are_the_value(
    qwen3: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerFast,
    always_recalled: list[NeedlePrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[EncodedPrompt] = []

    def noting(encoded: EncodedPrompt, *rest: object) -> torch.Tensor:
        seen.append(encoded)
        return copied_fraction(encoded, *rest)

    monkeypatch.setattr(retrieval_head, "copied_fraction", noting)
    completing = SMALL.model_copy(
        update={"chat": False, "num_distractors": 1, "max_context_tokens": 150}
    )
    measured = completing.score(qwen3, byte_tokenizer, no_progress)
    assert measured.details["chat"] is False
    for prompt, encoded in zip(always_recalled, seen, strict=True):
        ids = [encoded.token_ids[i] for i in encoded.needle_positions]
        assert byte_tokenizer.decode(ids) == prompt.fact.answer
        assert byte_tokenizer.decode(encoded.token_ids).endswith(prompt.fact.lead)


def test_refuses_contexts_over_the_models(
    qwen3: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = SMALL.model_copy(update={"max_context_tokens": 985})
    with pytest.raises(ProfilingError, match=r"is 985, but of the model's context of 1024 .* 984"):
        scorer.score(qwen3, byte_tokenizer, no_progress)


def test_default_lengths_fit_the_model(qwen3: PreTrainedModel) -> None:
    scorer = RetrievalHeadScorer()
    assert scorer._context_lengths(qwen3) == [248, 496, 744, 992]
    qwen3.config.max_position_embeddings = 100_000
    assert scorer._context_lengths(qwen3) == [1024, 2048, 3072, 4096]


def test_refuses_contexts_too_short_for_the_facts(
    qwen3: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    scorer = SMALL.model_copy(update={"max_context_tokens": 20})
    with pytest.raises(ValueError, match="context_tokens=20 is too short"):
        scorer.score(qwen3, byte_tokenizer, no_progress)


def test_refuses_a_chat_without_template(
    qwen3: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        SMALL.model_copy(update={"chat": True}).score(qwen3, byte_tokenizer, no_progress)
