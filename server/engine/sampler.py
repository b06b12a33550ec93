"""From logits to tokens.

What can be decided from the parameters is decided on the host: reading a GPU's tensor waits for all
that it has to do, so a step does that once, for its tokens, and again only for log probabilities.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from headlong.server.engine.device import to_device
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
        eos_token_ids: Tokens that `min_tokens` holds off, unless a structure allows no other.

    Returns:
        One token a sequence, which its matcher has not accepted yet. The same logits, parameters
        and seed give the same token, whatever the other rows are.
    """
    reports = [row for row, each in enumerate(sequences) if each.params.logprobs is not None]
    raw = torch.log_softmax(_rows(logits, reports), dim=-1) if reports else None
    adjusted = [row for row, each in enumerate(sequences) if _is_adjusted(each)]
    if adjusted:
        logits = logits.clone()
    for row in adjusted:
        _adjust(logits[row], sequences[row], eos_token_ids)
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, each in enumerate(sequences) if not each.params.greedy]
    if drawn:
        picked = _draw(_rows(logits, drawn), [sequences[row] for row in drawn])
        chosen.index_copy_(0, _index(drawn, logits.device), picked)
    tokens = [SampledToken(token) for token in chosen.tolist()]
    if raw is not None:
        asked = [sequences[row].params.logprobs or 0 for row in reports]
        told = report_logprobs(raw, [tokens[row].token_id for row in reports], asked)
        for row, token in zip(reports, told, strict=True):
            tokens[row] = token
    return tokens


def _index(values: Iterable[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(list(values), dtype=torch.int64), device)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, which may be all of them, in order."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, _index(rows, logits.device))


def _is_adjusted(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or sequence.num_output_tokens < params.min_tokens
        or sequence.matcher is not None
    )


def _adjust(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Penalties, biases, the structure and the minimum length, in place on [vocab_size]."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits.copy_(torch.where(_seen(sequence, logits), penalised, logits))
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output_tokens:
        occurrences = Counter(sequence.output_token_ids)
        tokens = _index(occurrences, logits.device)
        counts = _index(occurrences.values(), logits.device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
        logits[_index(params.logit_bias, logits.device)] += to_device(biases, logits.device)
    if sequence.matcher is not None:
        sequence.matcher.mask(logits)
    if sequence.num_output_tokens < params.min_tokens:
        enders = set(params.stop_token_ids)
        if not params.ignore_eos:
            enders |= eos_token_ids
        held_off = logits.index_fill(0, _index(sorted(enders), logits.device), -torch.inf)
        # What is complete ends, however short it is.
        if sequence.matcher is None or held_off.max() > -torch.inf:
            logits.copy_(held_off)


def _seen(sequence: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """Which tokens occur in a sequence, bool [vocab_size]; only what is new is read."""
    if sequence.seen is None:
        sequence.seen = torch.zeros_like(logits, dtype=torch.bool)
    sequence.seen[_index(sequence.token_ids[sequence.num_seen :], logits.device)] = True
    sequence.num_seen = len(sequence.token_ids)
    return sequence.seen


def _draw(logits: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    """Sample rows of [num_rows, vocab_size] by temperature, top_k, top_p and min_p, in that order.

    Dividing probabilities by independent exponential variates and taking the largest is a draw
    from them; every row has its own random numbers.
    """
    asked = [each.params for each in sequences]
    table = [(each.temperature, each.top_k, each.top_p, each.min_p) for each in asked]
    columns = to_device(torch.tensor(table, dtype=torch.float32), logits.device)
    # Each is [num_rows, 1].
    temperature, top_k, top_p, min_p = columns[:, :, None].unbind(1)
    # The largest becomes 0, so that no temperature makes an infinity of it.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if any(each.top_k > 0 or each.top_p < 1.0 for each in asked):
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
    if any(each.min_p > 0 for each in asked):
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    noise = torch.stack(
        [
            torch.empty_like(row).exponential_(generator=sequence.generator)
            for row, sequence in zip(probs, sequences, strict=True)
        ]
    )
    return (probs / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(dim=-1)


def report_logprobs(
    logprobs: torch.Tensor, token_ids: list[int], counts: list[int]
) -> list[SampledToken]:
    """Tokens with their log probabilities, and the `counts` most probable ones of each row."""
    chosen = logprobs.gather(1, _index(token_ids, logprobs.device)[:, None])[:, 0].tolist()
    tops: dict[int, tuple[tuple[int, float], ...]] = {}
    # Not the most of any row, and then a part of it: ties could fall otherwise with other mates.
    for count in set(counts) - {0}:
        rows = [row for row, each in enumerate(counts) if each == count]
        values, tokens = _rows(logprobs, rows).topk(count)
        for row, line in zip(rows, zip(tokens.tolist(), values.tolist(), strict=True), strict=True):
            tops[row] = tuple(zip(*line, strict=True))
    return [
        SampledToken(token, logprob, tops.get(row, ()))
        for row, (token, logprob) in enumerate(zip(token_ids, chosen, strict=True))
    ]
