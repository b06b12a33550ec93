import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headlong.demo.rows import WEIGHT_ANSWER, WEIGHT_COPY, RowWriter
from headlong.demo.tokenizer import train_tokenizer
from headlong.demo.train import (
    FULL,
    TINY,
    Stage,
    build_model,
    causal_attention,
    learning_rate,
    stage_at,
    train,
)


@pytest.fixture(scope="module")
def writer() -> RowWriter:
    return RowWriter(train_tokenizer(seed=0), seed=0, max_positions=16384)


@pytest.mark.parametrize("row_tokens", [64, 100, 512, 4096])
def test_rows_have_their_length_and_repeat_by_step(writer: RowWriter, row_tokens: int) -> None:
    tokens, weights, positions = writer.batch(3, 12, row_tokens, skip_positions=True)
    assert tokens.shape == weights.shape == positions.shape == (12, row_tokens)
    again = writer.batch(3, 12, row_tokens, skip_positions=True)
    assert all(torch.equal(a, b) for a, b in zip((tokens, weights, positions), again, strict=True))
    assert not torch.equal(tokens, writer.batch(4, 12, row_tokens, skip_positions=True)[0])
    assert (weights == WEIGHT_ANSWER).any()
    assert (weights == WEIGHT_COPY).any()


def test_positions_only_jump_ahead(writer: RowWriter) -> None:
    _, _, positions = writer.batch(0, 64, 256, skip_positions=True)
    assert (positions.diff(dim=1) >= 1).all()
    assert (positions.diff(dim=1) > 1).any()
    assert positions.max() < 16384
    _, _, plain = writer.batch(0, 4, 256, skip_positions=False)
    assert torch.equal(plain, torch.arange(256).expand(4, -1))


def test_every_answer_was_stated_before(writer: RowWriter) -> None:
    tokens, weights, _ = writer.batch(9, 60, 512, skip_positions=False)
    spans = 0
    for row, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        index = 0
        while index < len(row):
            end = index
            while end < len(row) and weight[end] == WEIGHT_ANSWER:
                end += 1
            if end > index:
                # The name, which directly precedes the value, makes the match unambiguous.
                wanted = row[index - 1 : end]
                starts = range(index - len(wanted))
                assert any(row[s : s + len(wanted)] == wanted for s in starts)
                spans += 1
            index = end + 1
    assert spans > 60


def test_jumps_in_the_positions_hide_nothing() -> None:
    tokenizer = train_tokenizer(0, TINY.vocab_size, TINY.max_positions)
    model = build_model(TINY, tokenizer)
    ids = torch.tensor([random.Random(0).choices(range(300), k=40)])
    positions = torch.arange(40)[None] + (torch.arange(40)[None] >= 20) * 5000
    changed = ids.clone()
    changed[0, 3] += 1
    with torch.no_grad():
        before = model(ids, position_ids=positions).logits
        after = model(changed, position_ids=positions).logits
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.equal(before[0, 39], after[0, 39])


@pytest.mark.parametrize("tokens", [5, 300])
def test_both_ways_of_attending_agree(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, tokens, 16, generator=generator)
    key, value = (torch.randn(2, 2, tokens, 16, generator=generator) for _ in range(2))
    output, _ = causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    logits = 0.3 * query @ key.repeat_interleave(2, 1).mT
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(FULL, step) for step in range(FULL.num_steps)]
    peak = rates.index(max(rates))
    assert peak < 2 * FULL.warmup_steps
    assert rates[0] < rates[peak] <= FULL.learning_rate
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_stages_follow_each_other() -> None:
    recipe = replace(TINY, stages=(Stage(64, 2, False), Stage(128, 1, True)))
    assert [stage_at(recipe, step).row_tokens for step in range(3)] == [64, 64, 128]
    with pytest.raises(ValueError, match="step 3"):
        stage_at(recipe, 3)


def test_a_tiny_run_learns_repeats_and_resumes(tmp_path: Path) -> None:
    straight = train(TINY, tmp_path / "a", bf16=False)
    assert sum(straight[-4:]) < sum(straight[:4])
    halves = train(TINY, tmp_path / "b", bf16=False, stop_after=9)
    halves += train(TINY, tmp_path / "b", bf16=False)
    assert halves == straight
    one = load_file(tmp_path / "a" / "model.safetensors")
    two = load_file(tmp_path / "b" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train(replace(TINY, seed=1), tmp_path / "c", bf16=False, stop_after=3)
    assert other != straight[:3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.config.vocab_size >= len(tokenizer)
