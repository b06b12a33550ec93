"""Sequences without an engine."""

import torch
from transformers import PreTrainedTokenizerBase

from headlong.cache.policy import RETRIEVAL
from headlong.cache.prefix_keys import PrefixKeys
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sequence import Sequence, SequencePlan


def make_sequence(
    request: EngineRequest, tokenizer: PreTrainedTokenizerBase, max_len: int = 4096
) -> Sequence:
    """One whose heads keep everything."""
    policies = (RETRIEVAL,)
    plan = SequencePlan(policies, PrefixKeys(b"", policies, "", 16), max_len)
    seed = request.params.seed or 0
    return Sequence(request, 0, plan, tokenizer, seed=seed, device=torch.device("cpu"))
