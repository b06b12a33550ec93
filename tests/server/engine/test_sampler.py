import math

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampler import sample
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.sequence import Sequence
from headlong.server.errors import InvalidRequestError
from support.sequences import make_sequence
from support.tiny_models import save_byte_tokenizer

CPU = torch.device("cpu")
EOS = frozenset({2})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


class Draws:
    """Draws many tokens for one row of logits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def sequence(self, params: SamplingParams, prompt: tuple[int, ...] = (5,)) -> Sequence:
        return make_sequence(EngineRequest("r", prompt, params), self.tokenizer)

    def __call__(self, logits: list[float], count: int = 400, **params: object) -> list[int]:
        sequence = self.sequence(SamplingParams(seed=7, **params))  # type: ignore[arg-type]
        row = torch.tensor([logits])
        return [sample(row.clone(), [sequence], EOS)[0].token_id for _ in range(count)]


@pytest.fixture
def draws(tokenizer: PreTrainedTokenizerBase) -> Draws:
    return Draws(tokenizer)


LOGITS = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


def test_greedy_takes_the_largest(draws: Draws) -> None:
    assert set(draws([0.0, 3.0, 2.9], temperature=0.0)) == {1}


def test_sampling_follows_the_probabilities(draws: Draws) -> None:
    drawn = draws(LOGITS, count=4000)
    for token, probability in enumerate((0.4, 0.3, 0.2, 0.1)):
        share = drawn.count(token) / len(drawn)
        assert abs(share - probability) < 0.04


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"min_p": 0.6}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 2, "min_p": 1.0}, {0}),
        ({"temperature": 0.01}, {0}),
    ],
)
def test_truncation(draws: Draws, params: dict[str, float], allowed: set[int]) -> None:
    assert set(draws(LOGITS, **params)) == allowed


@pytest.mark.parametrize("temperature", [1e-30, 1e-320, 1.1e-5])
def test_a_temperature_of_nearly_nothing_is_greedy(draws: Draws, temperature: float) -> None:
    assert set(draws([5.0, 80.0, -3.0], temperature=temperature)) == {1}


def test_a_mate_that_truncates_leaves_other_rows_alone(draws: Draws) -> None:
    """Of a large vocabulary the tail is small, and still there: top_p of 1 drops nothing."""
    params = SamplingParams(seed=11, temperature=1.0)
    mate = SamplingParams(seed=12, top_p=0.5)
    row = torch.full((1, 150_000), -20.0)
    row[0, 0] = 0.0
    alone, together, other = draws.sequence(params), draws.sequence(params), draws.sequence(mate)
    for _ in range(5):
        expected = sample(row.clone(), [alone], EOS)[0].token_id
        pair = sample(torch.cat([row, row]), [other, together], EOS)
        assert pair[1].token_id == expected


def test_a_seed_repeats_and_batch_mates_do_not_matter(draws: Draws) -> None:
    params = SamplingParams(seed=11, temperature=1.3, top_p=0.9)
    mate = SamplingParams(seed=12, top_k=2)
    row = torch.randn(1, 50)
    alone, together = draws.sequence(params), draws.sequence(params)
    other = draws.sequence(mate)
    for _ in range(20):
        expected = sample(row.clone(), [alone], EOS)[0].token_id
        pair = sample(torch.cat([torch.randn(1, 50), row]), [other, together], EOS)
        assert pair[1].token_id == expected


def test_penalties(draws: Draws) -> None:
    def chosen(logits: list[float], output: tuple[int, ...], **params: object) -> int:
        sequence = draws.sequence(SamplingParams(temperature=0.0, **params), prompt=(0,))  # type: ignore[arg-type]
        sequence.token_ids.extend(output)
        return sample(torch.tensor([logits]), [sequence], EOS)[0].token_id

    assert chosen([2.0, 1.5, 0.0], ()) == 0
    # the repetition penalty knows the prompt, the other two do not
    assert chosen([2.0, 1.5, 0.0], (), repetition_penalty=2.0) == 1
    assert chosen([2.0, 1.5, 0.0], (), presence_penalty=2.0) == 0
    assert chosen([2.0, 1.5, 0.0], (0,), presence_penalty=0.6) == 1
    assert chosen([2.0, 1.5, 0.0], (0,), frequency_penalty=0.3) == 0
    assert chosen([2.0, 1.5, 0.0], (0, 0), frequency_penalty=0.3) == 1
    assert chosen([-1.0, -1.5, -9.0], (), repetition_penalty=2.0) == 1
    assert chosen([2.0, 1.5, 0.0], (), logit_bias={2: 5.0}) == 2


def test_the_logits_given_are_left_as_they_are(draws: Draws) -> None:
    sequence = draws.sequence(SamplingParams(logit_bias={1: 5.0}, seed=1))
    logits = torch.tensor([LOGITS])
    sample(logits, [sequence], EOS)
    assert torch.equal(logits, torch.tensor([LOGITS]))


def test_minimum_length_holds_off_the_end(draws: Draws) -> None:
    params = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(3,))
    sequence = draws.sequence(params)
    logits = [0.0, 1.0, 9.0, 8.0]
    assert sample(torch.tensor([logits]), [sequence], EOS)[0].token_id == 1
    sequence.token_ids.append(1)
    assert sample(torch.tensor([logits]), [sequence], EOS)[0].token_id == 2


def test_logprobs_are_the_models_own(draws: Draws) -> None:
    sequence = draws.sequence(SamplingParams(temperature=0.0, logprobs=2, logit_bias={3: 50.0}))
    token = sample(torch.tensor([LOGITS]), [sequence], EOS)[0]
    assert token.token_id == 3
    assert token.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [each for each, _ in token.top] == [0, 1]
    assert token.top[0][1] == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": float("inf")},
        {"top_k": -1},
        {"top_k": 2**31},
        {"repetition_penalty": 1e-40},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: 101.0}},
        {"stop": ("",)},
        {"logprobs": 21},
        {"seed": 2**64},
    ],
)
def test_bad_parameters_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**wrong)  # type: ignore[arg-type]
    (name,) = wrong
    assert caught.value.param == name
    assert name in caught.value.message
