"""From logits to tokens."""

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from headlong.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, with natural-log probabilities of the model's own distribution if asked for.

    Attributes:
        token_id: The token.
        logprob: Its log probability, before penalties, temperature and truncation.
        top: Most probable (token id, log probability) pairs, best first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: torch.Tensor, sequences: Many[Sequence], eos_token_ids: frozenset[int]
) -> list[SampledToken]:
    """Choose the next token of each sequence.

    Args:
        logits: float32 [num_sequences, vocab_size]; left as they are.
        sequences: Whose they are.
        eos_token_ids: Tokens that `min_tokens` holds off.

    Returns:
        One token a sequence. The same logits, parameters and seed give the same token, whatever
        the other rows are.
    """
    reports = [row for row, each in enumerate(sequences) if each.params.logprobs is not None]
    raw = torch.log_softmax(logits[reports], dim=-1) if reports else None
    adjusted = [row for row, each in enumerate(sequences) if _is_adjusted(each)]
    if adjusted:
        logits = logits.clone()
    for row in adjusted:
        _adjust(logits[row], sequences[row], eos_token_ids)
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, each in enumerate(sequences) if not each.params.greedy]
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [sequences[row] for row in drawn])
    tokens = [SampledToken(token) for token in chosen.tolist()]
    if raw is not None:
        for line, row in zip(raw, reports, strict=True):
            tokens[row] = _report(line, tokens[row].token_id, sequences[row].params.logprobs or 0)
    return tokens


def _is_adjusted(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or sequence.num_output_tokens < params.min_tokens
    )


def _adjust(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Penalties, biases and the minimum length, in place on [vocab_size]."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output_tokens:
        occurrences = Counter(sequence.output_token_ids)
        tokens = torch.tensor(list(occurrences), device=logits.device)
        counts = torch.tensor(list(occurrences.values()), device=logits.device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if sequence.num_output_tokens < params.min_tokens:
        enders = set(params.stop_token_ids)
        if not params.ignore_eos:
            enders |= eos_token_ids
        logits[sorted(enders)] = -torch.inf


def _draw(logits: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    """Sample rows of [num_rows, vocab_size] by temperature, top_k, top_p and min_p, in that order.

    Dividing probabilities by independent exponential variates and taking the largest is a draw
    from them; every row has its own random numbers.
    """

    def column(name: str) -> torch.Tensor:
        values = [getattr(each.params, name) for each in sequences]
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    # The largest becomes 0, so that no temperature makes an infinity of it.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / column("temperature")
    top_k, top_p, min_p = column("top_k"), column("top_p"), column("min_p")
    if bool((top_k > 0).any()) or bool((top_p < 1.0).any()):
        ordered, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        dropped = (rank >= top_k) & (top_k > 0)
        ordered = ordered.masked_fill(dropped, -torch.inf)
        probs = torch.softmax(ordered, dim=-1)
        # A token stays while those before it have not reached top_p: the first always stays.
        before = probs.cumsum(dim=-1) - probs
        beyond = (before >= top_p) & (rank > 0) & (top_p < 1.0)
        ordered = ordered.masked_fill(beyond, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    probs = torch.softmax(logits, dim=-1)
    if bool((min_p > 0).any()):
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    noise = torch.stack(
        [
            torch.empty_like(row).exponential_(generator=sequence.generator)
            for row, sequence in zip(probs, sequences, strict=True)
        ]
    )
    return (probs / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(dim=-1)


def _report(logprobs: torch.Tensor, token_id: int, count: int) -> SampledToken:
    values, tokens = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(logprobs[token_id]), top)
